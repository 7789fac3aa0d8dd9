"""What a run is told: frozen dataclasses, one per component, each checked where it is declared.

A recipe builds one of these in Python; `cli` turns it into a command line whose defaults are the recipe's values, and
`from_dict` reads it back from a run's `config.json`. Unknown keys fail. This module imports neither torch nor ray, so
`--help` is instant; drivers convert to Ray Train's own types, whose names and meaning the run fields carry.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "ElasticConfig",
    "EngineConfig",
    "EvalConfig",
    "FailureConfig",
    "GuardConfig",
    "LoRAConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PretrainConfig",
    "RecomputeConfig",
    "ReplicaConfig",
    "RunConfig",
    "SFTConfig",
    "SFTDataConfig",
    "ScalingConfig",
    "ScheduleConfig",
    "ServeConfig",
    "ServingConfig",
    "StepConfig",
    "TrainConfig",
    "Typed",
    "cli",
    "from_dict",
    "report_error",
    "to_dict",
]

T = TypeVar("T")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


class Typed:
    """Holds a dataclass's fields to their declared types when it is made: a recipe's slip fails like a JSON file's.

    Integers where a float is expected become one, lists tuples, paths strings. Raises ValueError for anything else.
    """

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _convert(hint, getattr(self, name), f"{type(self).__name__}.{name}"))


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder's block, by their Hugging Face names."""


@dataclass(frozen=True)
class LoRAConfig(Typed):
    """Low-rank adapters (Hu et al. 2021): W stays as it is, and what is trained is B A beside it, of a small rank."""

    rank: int = 0
    """Of B A, PEFT's r; 0 trains the whole model instead."""
    alpha: float = 16.0
    """B A counts alpha / rank, PEFT's lora_alpha."""
    target_modules: tuple[
        Literal["all-linear", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...
    ] = ("all-linear",)
    """Which linear layers have adapters; all-linear is all of a block's."""
    rslora: bool = False
    """B A counts alpha / sqrt(rank) (Kalajdzievski 2023), PEFT's use_rslora."""
    path: str | None = None
    """Directory in PEFT's format whose adapters to begin with; the fields above are then what it says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.rank >= 0, f"lora.rank is {self.rank}; it must be at least 1, or 0 for no adapters")
        _require(self.alpha > 0 and math.isfinite(self.alpha), f"lora.alpha is {self.alpha}; it must be positive")
        _require(bool(self.target_modules), "lora.target_modules is empty; name layers, all-linear, or set lora.rank 0")

    @property
    def scale(self) -> float:
        """What B A counts."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the layers that have adapters, in the order of a block."""
        return tuple(name for name in LINEAR if name in self.target_modules or "all-linear" in self.target_modules)


@dataclass(frozen=True)
class ModelConfig(Typed):
    """Which model: a preset (`raytron models` lists them) or a Hugging Face directory, and what to change in it."""

    preset: str = "llama3.2-1b"
    """Name of an architecture."""
    path: str | None = None
    """Hugging Face directory to start from, weights included; overrules `preset`."""
    overrides: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Fields of the architecture to change, by their Hugging Face names: `num_hidden_layers 4 hidden_size 256`."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass(frozen=True)
class DataConfig(Typed):
    """Where tokens come from and how they are cut into samples."""

    path: str | None = None
    """Text, JSONL, Parquet, a folder of them, or the prefix of a .bin/.idx pair."""
    blend: tuple[tuple[float, str], ...] = ()
    """(weight, path) pairs, instead of `path`."""
    mock: bool = False
    """Megatron's mock data (counting documents) where neither `path` nor `blend` is given."""
    tokenizer: str = "byte"
    """byte | null:VOCAB | bpe:VOCAB (trained on the data) | a Hugging Face directory or tokenizer.json."""
    sequence_length: int = 1024
    """Tokens of a sample."""
    split: str = "99,1,0"
    """Weights of the train, validation and test parts."""
    seed: int = 1234
    json_key: str = "text"
    """Key of a JSONL line, or column of a Parquet file, that holds the text."""
    document_mask: bool = False
    """Attention does not cross documents."""
    eod_mask_loss: bool = False
    """No loss where the input is the end of a document."""
    reset_position_ids: bool = False
    """Positions start anew with every document."""
    cache_path: str | None = None
    """Where tokenised data and indices are kept; by default beside the run."""
    workers: int | None = None
    """Tokenising processes; by default one per core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.sequence_length >= 1, f"data.sequence_length is {self.sequence_length}; it must be at least 1")
        _require(not (self.path and self.blend), "data.path and data.blend exclude each other; set one of them")
        _require(
            all(w > 0 and math.isfinite(w) for w, _ in self.blend), "data.blend: every weight must be a positive number"
        )
        _require(self.workers is None or self.workers >= 1, f"data.workers is {self.workers}; it must be at least 1")


@dataclass(frozen=True)
class SFTDataConfig(Typed):
    """Prompts with answers to fine-tune on, and how they are put into rows."""

    path: str | None = None
    """JSONL, or a folder of it: {"prompt", "response"}, {"messages"} or {"tokens", "chosen"} in each line."""
    evaluation_path: str | None = None
    """The same to evaluate on."""
    held_out: int = 0
    """Without `evaluation_path`: so many of the first examples are evaluated on, and not trained on."""
    tokenizer: str | None = None
    """A Hugging Face directory or tokenizer.json; by default the model's own, and bytes for a new model."""
    sequence_length: int = 1024
    """Tokens of a row."""
    packing: bool = True
    """Several examples in a row, which don't see each other; else each has one of its own."""
    overlong: Literal["refuse", "truncate", "drop"] = "refuse"
    """Examples longer than a row: end the run, cut them, or leave them out; how many is said."""
    chat: bool = False
    """Render a prompt and its response as a chat too, through the tokenizer's chat template."""
    seed: int = 1234
    """Of the order, which is another one in each epoch."""
    cache_path: str | None = None
    """Where tokenized examples are kept; by default beside the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.sequence_length >= 1, f"data.sequence_length is {self.sequence_length}; it must be at least 1")
        _require(self.held_out >= 0, f"data.held_out is {self.held_out}; it must not be negative")
        _require(
            not (self.evaluation_path and self.held_out),
            "data.evaluation_path and data.held_out exclude each other; set one of them",
        )


@dataclass(frozen=True)
class ParallelConfig(Typed):
    """How one step is spread over ranks. dp is what is left: num_workers / (tp x pp)."""

    tp: int = 1
    """Tensor parallel size; keep it inside a node."""
    pp: int = 1
    """Pipeline stages."""
    virtual_stages: int = 1
    """Model chunks per pipeline rank (interleaving)."""
    schedule: Literal["gpipe", "1f1b", "interleaved-1f1b", "zero-bubble"] = "1f1b"
    sequence_parallel: bool = True
    """Split norms and residuals over tp by tokens (used when tp > 1)."""
    zero: bool = True
    """ZeRO-1: split masters and moments over dp."""
    twins: bool = False
    """Keep each of those shards on two dp ranks, dp / 2 apart, so that losing a node loses nothing: twice their memory.
    Nothing to do at dp 1."""
    bucket_mb: float = 40.0
    """Gradients are reduced over dp in buckets of about this many MiB, overlapping the backward."""
    layers_per_stage: tuple[int, ...] | None = None
    """Decoder layers of each of the pp x virtual_stages chunks, in model order; by default as even as it goes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tp", "pp", "virtual_stages"):
            _require(getattr(self, name) >= 1, f"parallel.{name} is {getattr(self, name)}; it must be at least 1")
        _require(self.bucket_mb > 0, f"parallel.bucket_mb is {self.bucket_mb}; it must be positive")
        _require(
            self.zero or not self.twins,
            "parallel.twins keeps a second copy of ZeRO's shards; with parallel.zero off every dp rank holds all "
            "of them already, so leave parallel.twins off too",
        )
        if self.schedule == "interleaved-1f1b":
            _require(self.virtual_stages > 1, "parallel.schedule interleaved-1f1b needs parallel.virtual_stages >= 2")
        if self.schedule == "1f1b" and self.virtual_stages > 1:
            object.__setattr__(self, "schedule", "interleaved-1f1b")
        if self.layers_per_stage is not None:
            chunks = self.pp * self.virtual_stages
            _require(
                len(self.layers_per_stage) == chunks and min(self.layers_per_stage) >= 1,
                f"parallel.layers_per_stage {self.layers_per_stage} must name at least one layer for each of the "
                f"pp x virtual_stages = {chunks} chunks",
            )


@dataclass(frozen=True)
class OptimizerConfig(Typed):
    """AdamW (Loshchilov and Hutter 2019). Norms and biases are not decayed."""

    lr: float = 3e-4
    """Highest learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the end of the decay."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices."""
    clip_grad: float = 1.0
    """Largest global gradient norm, over every axis; 0 turns clipping off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.lr > 0 and math.isfinite(self.lr), f"optimizer.lr is {self.lr}; it must be a positive number")
        _require(0 <= self.min_lr <= self.lr, f"optimizer.min_lr {self.min_lr} must lie between 0 and lr {self.lr}")
        _require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "optimizer.beta1 and beta2 must lie in [0, 1)")
        _require(self.eps > 0 and self.weight_decay >= 0 and self.clip_grad >= 0, "optimizer: eps > 0, others >= 0")


@dataclass(frozen=True)
class ScheduleConfig(Typed):
    """Learning rate by committed step: linear warm-up, then the named decay from lr to min_lr."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    """Steps in which the learning rate rises to lr."""
    decay_steps: int | None = None
    """Step at which min_lr is reached (default: the run's last); for wsd, the length of its final decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.warmup_steps >= 0, "schedule.warmup_steps must not be negative")
        _require(self.decay_steps is None or self.decay_steps > 0, "schedule.decay_steps must be positive")


@dataclass(frozen=True)
class RecomputeConfig(Typed):
    """Activations to throw away in the forward and compute again in the backward."""

    mode: Literal["none", "selective", "full"] = "none"
    modules: tuple[str, ...] = ("attention",)
    """For selective: names of modules within a layer ("attention", "mlp", "input_norm", "post_norm")."""


@dataclass(frozen=True)
class GuardConfig(Typed):
    """What to do when a step's numbers are bad: run it again, skip its update, stop after too many skips in a row."""

    max_consecutive_skips: int = 10
    spike_factor: float | None = None
    """Skip when the gradient norm exceeds this many times its running mean; None watches only for NaN and Inf."""
    recheck: bool = True
    """Run a step whose numbers are bad again, in place and on another replica, to tell data from hardware."""
    suspect_factor: float | None = None
    """Run a step again, too, whose gradient norm exceeds this many times its running mean, before applying it."""
    tolerance: float | None = None
    """Relative difference of norms and losses that two runs of the same work may have; 0 compares bits. None: 0 on a
    CPU, 0.001 on a GPU, whose kernels may add in any order."""
    agreement_interval: int = 0
    """Compare what data-parallel replicas hold in common, by checksum, every so many steps; 0 never does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.max_consecutive_skips >= 1, "guard.max_consecutive_skips must be at least 1")
        _require(self.spike_factor is None or self.spike_factor > 1, "guard.spike_factor must exceed 1")
        _require(self.suspect_factor is None or self.suspect_factor > 1, "guard.suspect_factor must exceed 1")
        _require(
            self.suspect_factor is None or self.recheck, "guard.suspect_factor needs guard.recheck; turn that on too"
        )
        _require(self.tolerance is None or 0 <= self.tolerance < 1, "guard.tolerance must lie in [0, 1)")
        _require(self.agreement_interval >= 0, "guard.agreement_interval must not be negative; 0 never compares")


@dataclass(frozen=True)
class EvalConfig(Typed):
    """Held-out loss, every `interval` steps and at the end."""

    interval: int = 0
    """0 evaluates at the end only."""
    batches: int = 8
    """Global batches per evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.interval >= 0 and self.batches >= 0, "evaluation.interval and batches must not be negative")


@dataclass(frozen=True)
class LoggingConfig(Typed):
    """Where metrics go besides the progress line and metrics.jsonl."""

    tensorboard: bool = True
    """Event files in the run's folder."""
    prometheus: bool = False
    """The newest values as metrics.prom in the run's folder."""
    wandb_project: str | None = None
    """Weights & Biases (raytron[wandb])."""
    mlflow_experiment: str | None = None
    """MLflow (raytron[mlflow])."""


@dataclass(frozen=True)
class FailureConfig(Typed):
    """Ray Train's: how many failures to survive; -1 is any number."""

    max_failures: int = 0
    """Recoveries allowed, in place or from the newest checkpoint; -1 is any number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.max_failures >= -1, "failure_config.max_failures must be -1 (any number), 0 or more")


@dataclass(frozen=True)
class CheckpointConfig(Typed):
    """Ray Train's `num_to_keep`, and how often to save."""

    num_to_keep: int | None = 2
    """Newest checkpoints to keep; None keeps all."""
    interval: int = 0
    """Steps between saves; 0 saves at the end only."""
    asynchronous: bool = True
    """Write beside the training instead of between steps."""
    shard_mb: float = 5000.0
    """Largest size of one safetensors file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.num_to_keep is None or self.num_to_keep >= 1,
            "checkpoint_config.num_to_keep must be at least 1, or None to keep all",
        )
        _require(self.interval >= 0, "checkpoint_config.interval must not be negative; 0 saves at the end only")
        _require(self.shard_mb > 0, f"checkpoint_config.shard_mb is {self.shard_mb}; it must be positive")


@dataclass(frozen=True)
class RunConfig(Typed):
    """Ray Train's: the run's name and where its output goes."""

    name: str = "run"
    storage_path: str = "runs"
    """A local folder or a URI pyarrow understands (s3://, gs://, hdfs://); output lands in storage_path/name."""
    failure_config: FailureConfig = field(default_factory=FailureConfig)
    checkpoint_config: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            bool(self.name) and "/" not in self.name and self.name not in (".", ".."),
            f"run.name {self.name!r} must be a plain folder name",
        )


@dataclass(frozen=True)
class ScalingConfig(Typed):
    """Ray Train's. `num_workers` counts ranks; one number, or (min, max) for a run that may change size."""

    num_workers: int | tuple[int, int] = 1
    """Ranks; one number, or the fewest and the most."""
    use_gpu: bool = False
    """Give every rank a GPU."""
    resources_per_worker: dict[str, float] | None = None
    """What a rank reserves, by Ray's names; by default one CPU slot."""
    placement_strategy: str = "PACK"
    """Ray's strategy for the ranks of one replica."""
    accelerator_type: str | None = None
    """Only nodes with this accelerator, by Ray's name (H100, ...)."""
    spares: int = 0
    """Ranks kept started and ready beside those, to take the seat of one that is lost at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.bounds
        _require(1 <= low <= high, f"scaling.num_workers {self.num_workers} must be at least 1, and min <= max")
        _require(self.spares >= 0, f"scaling.spares is {self.spares}; it must not be negative")

    @property
    def bounds(self) -> tuple[int, int]:
        """(min, max) ranks."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    @property
    def gpus_per_worker(self) -> float:
        """GPUs of a rank."""
        return (self.resources_per_worker or {}).get("GPU", float(self.use_gpu))


@dataclass(frozen=True)
class ElasticConfig(Typed):
    """How a run goes on when ranks are lost or hang, or when the cluster grows, shrinks or is asked to."""

    in_place: bool = True
    """Keep the ranks that are left and their memory after a failure; else all are started again from a checkpoint."""
    hang_factor: float = 20.0
    """A rank hangs that gets on with nothing for so many times the median step, while it waits for no other ..."""
    hang_s: float = 120.0
    """... but not before so many seconds; it is ended then, as if it had died."""
    silence_s: float = 20.0
    """So does a process that is not heard of for so many seconds."""
    replace_slow: bool = False
    """Replace a rank whose own work takes longer than its peers', where that saves more time than it costs."""
    hold_s: float = 10.0
    """No growing sooner than this after a failure or a change of size."""
    wait_s: float = 1800.0
    """How long to wait for a cluster that cannot hold the fewest ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.hang_factor > 1, f"elastic.hang_factor is {self.hang_factor}; it must exceed 1")
        for name in ("hang_s", "silence_s"):
            _require(getattr(self, name) > 0, f"elastic.{name} is {getattr(self, name)}; it must be positive")
        for name in ("hold_s", "wait_s"):
            _require(getattr(self, name) >= 0, f"elastic.{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True)
class EngineConfig(Typed):
    """An inference engine: which model, on which layout, with how much memory."""

    path: str = ""
    """Hugging Face directory of the model."""
    engine: Literal["native", "vllm"] = "native"
    tp: int = 1
    """Tensor parallel size."""
    pp: int = 1
    """Pipeline stages."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is what the model's config.json says."""
    max_model_len: int | None = None
    """Tokens of prompt and output together; by default the model's max_position_embeddings."""
    max_num_seqs: int = 64
    """Sequences computed together."""
    max_batched_tokens: int = 1024
    """Tokens of one step; longer prompts are computed in chunks."""
    block_size: int = 32
    """Tokens of a cache block."""
    kv_cache_mb: float = 512.0
    """Memory for keys and values, on each rank."""
    prefix_caching: bool = True
    """Keep the blocks of finished requests for prompts that begin alike."""
    reproducible: bool = False
    """The same bits for the same tokens, whatever they are batched with, and the bits of the trainer's forward."""
    threads: int | None = None
    """CPU threads of a rank; by default what torch chooses."""
    seed: int = 0
    """Of requests that name none."""
    logprobs: Literal["raw", "processed"] = "raw"
    """Which distribution log-probabilities are of: the model's own, or the one tokens are drawn from, after
    temperature, penalties and filters."""
    weights: Literal["read", "await"] = "read"
    """await: start without reading any; nothing is answered before a first update has brought all of them."""
    sleep_mode: bool = False
    """vLLM on a GPU: be able to give memory back while others compute (`Engine.sleep`); the native engine always is."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters beside the model's weights; the native engine only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tp", "pp", "max_num_seqs", "max_batched_tokens", "block_size"):
            _require(getattr(self, name) >= 1, f"engine.{name} is {getattr(self, name)}; it must be at least 1")
        _require(self.kv_cache_mb > 0, f"engine.kv_cache_mb is {self.kv_cache_mb}; it must be positive")
        _require(
            self.max_model_len is None or self.max_model_len >= 2,
            f"engine.max_model_len is {self.max_model_len}; it must be at least 2",
        )
        _require(self.threads is None or self.threads >= 1, "engine.threads must be at least 1")
        _require(
            self.engine == "native" or not (self.lora.rank or self.lora.path),
            "engine.lora is what the native engine does; give vllm a model with the adapters merged into it, as the "
            "model folder of every checkpoint is",
        )


@dataclass(frozen=True)
class ServeConfig(Typed):
    """What faces the network: where to listen, who may ask, and how much of it."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface of the machine, and then wants `api_keys`."""
    port: int = 8000
    """0 takes a free one."""
    api_keys: tuple[str, ...] = ()
    """Keys that may ask (`Authorization: Bearer KEY`); where there are any, everything but /health needs one."""
    admin_key: str | None = None
    """The key of /admin. Without one, /admin answers only where there are no `api_keys` either."""
    requests_per_minute: float | None = None
    """Of one key, or of one address where there are no keys."""
    tokens_per_minute: float | None = None
    """Of one key or address, prompt and output together."""
    max_queue: int = 256
    """Requests that may wait for their first token at one engine; more are refused with 429 and Retry-After."""
    max_body_mb: float = 4.0
    """Largest body of a request; a larger one is refused with 413 as soon as it is seen to be larger."""
    max_prompts: int = 128
    """Prompts in one request of /v1/completions, and messages of a chat times 8."""
    max_connections: int = 2048
    """Connections open at one time; more get 503."""
    header_timeout_s: float = 10.0
    """A connection that takes longer to send the head of a request is closed."""
    body_timeout_s: float = 30.0
    """A request whose body takes longer to arrive gets 408."""
    keep_alive_s: float = 30.0
    """An idle connection is closed after so long."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.port < 65536, f"serve.port is {self.port}; it must lie between 0 and 65535")
        _require(all(self.api_keys) and self.admin_key != "", "serve: a key must not be empty")
        _require(self.admin_key not in self.api_keys, "serve.admin_key must not be one of serve.api_keys")
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"serve.{name} is {value}; it must be positive, or None for no limit")
        for name in ("max_queue", "max_prompts", "max_connections"):
            _require(getattr(self, name) >= 1, f"serve.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_body_mb", "header_timeout_s", "body_timeout_s", "keep_alive_s"):
            _require(getattr(self, name) > 0, f"serve.{name} is {getattr(self, name)}; it must be positive")


@dataclass(frozen=True)
class ReplicaConfig(Typed):
    """How many engines serve a model, what each reserves, and when there are more or fewer."""

    min_replicas: int = 1
    """0 gives everything back when nobody asks; the first request then waits for a replica to start."""
    max_replicas: int = 1
    target_requests: float = 16.0
    """Requests in flight and waiting, for each replica, to aim at; more of them add replicas, fewer end some."""
    upscale_delay_s: float = 2.0
    """How long there must be more before a replica is added (from zero: not at all)."""
    downscale_delay_s: float = 60.0
    """How long there must be fewer before a replica is ended."""
    drain_s: float = 120.0
    """A replica that is to end may take so long to finish its requests."""
    resources: dict[str, float] | None = None
    """What a rank reserves, by Ray's names; by default a CPU slot for each of its threads, and its GPU."""
    use_gpu: bool = False
    """Give every rank a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            0 <= self.min_replicas <= self.max_replicas and self.max_replicas >= 1,
            f"replicas {self.min_replicas} to {self.max_replicas}: min may be 0, max must be at least 1 and min",
        )
        _require(self.target_requests > 0, f"replicas.target_requests is {self.target_requests}; it must be positive")
        for name in ("upscale_delay_s", "downscale_delay_s", "drain_s"):
            _require(getattr(self, name) >= 0, f"replicas.{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True)
class ServingConfig(Typed):
    """A served model: its engine, how many of them, and what faces the network."""

    name: str = "model"
    """What requests call it."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    replicas: ReplicaConfig = field(default_factory=ReplicaConfig)
    http: ServeConfig = field(default_factory=ServeConfig)


@dataclass(frozen=True)
class StepConfig(Typed):
    """How a model is trained, whatever it is trained on."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    precision: Literal["fp32", "bf16", "bf16-amp", "fp64"] = "fp32"
    """bf16: bf16 weights with fp32 masters; bf16-amp: fp32 weights, bf16 matrix products; fp64: for tests."""
    steps: int = 100
    """Steps of the whole run."""
    seed: int = 1234
    """Of the initial weights; data.seed orders the samples."""
    compile: bool = False
    """Compile the layers with torch.compile: slower to start, faster after."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.steps >= 0, f"steps is {self.steps}; it must not be negative")


@dataclass(frozen=True)
class TrainConfig(StepConfig):
    """What a `TrainEngine` needs besides its model, for batches of equal samples."""

    global_batch_size: int = 8
    """Samples per step, over all ranks."""
    micro_batch_size: int = 1
    """Samples one rank works on at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("global_batch_size", "micro_batch_size"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")

    def micro_batches(self, dp: int, index: int = 0, uneven: bool = False) -> int:
        """Micro-batches that dp rank `index` runs in a step.

        uneven: where dp does not divide them, the first ranks run one more than the others.
        """
        per_rank = dp * self.micro_batch_size
        _require(
            self.global_batch_size % (self.micro_batch_size if uneven else per_rank) == 0,
            f"global_batch_size {self.global_batch_size} is not divisible by dp x micro_batch_size = {dp} x "
            f"{self.micro_batch_size}; use a multiple of {per_rank}",
        )
        count = self.global_batch_size // self.micro_batch_size
        _require(
            count >= dp,
            f"global_batch_size {self.global_batch_size} is {count} micro-batches of {self.micro_batch_size}, too few "
            f"for dp {dp}; use fewer ranks, or a multiple of {per_rank}",
        )
        return count // dp + (index < count % dp)


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """A whole pretraining run: model, data, how to train, on what, and where its output goes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    resume: bool = True
    """Continue from the newest checkpoint under storage_path/name when there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.scaling.bounds
        for workers in (low, high):
            self.micro_batches(self.dp(workers), uneven=low < high)

    def dp(self, num_workers: int | None = None) -> int:
        """Data-parallel size with `num_workers` ranks (by default the largest the run may have)."""
        workers = self.scaling.bounds[1] if num_workers is None else num_workers
        unit = self.parallel.tp * self.parallel.pp
        _require(
            workers % unit == 0,
            f"scaling.num_workers {workers} is not divisible by parallel tp x pp = {self.parallel.tp} x "
            f"{self.parallel.pp}; use a multiple of {unit}",
        )
        return workers // unit


@dataclass(frozen=True)
class SFTConfig(PretrainConfig):
    """A whole supervised fine-tuning run. What is not here is as in pretraining."""

    data: SFTDataConfig = field(default_factory=SFTDataConfig)
    epochs: int = 1
    """How often the examples are gone through."""
    steps: int = 0
    """Steps of the whole run; 0: as many as `epochs` take."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-5, min_lr=0.0, weight_decay=0.0, beta2=0.999)
    )
    evaluation: EvalConfig = field(default_factory=lambda: EvalConfig(batches=32))
    """Of the held-out examples, so many global batches at most."""
    answers: int = 3
    """Held-out prompts that the model is asked at the end, in the driver's process; 0 for a model too large for it."""
    run: RunConfig = field(default_factory=lambda: RunConfig(name="sft"))

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.epochs >= 1, f"epochs is {self.epochs}; it must be at least 1 (or set steps)")
        _require(self.answers >= 0, f"answers is {self.answers}; it must not be negative")

    @property
    def tokenizer(self) -> str:
        """What `raytron.data.load_tokenizer` takes."""
        return self.data.tokenizer or self.model.path or "byte"


def cli(default: T, *, description: str | None = None, args: Sequence[str] | None = None) -> T:
    """Read the command line into a copy of `default`; every field is a flag (`--parallel.tp 2`).

    `args` stand in for the command line. Without them the caller is a script being run, whose user is told what is
    wrong and not where it was noticed: from here on `report_error` shows what ends it.
    """
    from tyro import cli as parse
    from tyro.constructors import ConstructorRegistry

    if args is None:
        sys.excepthook = report_error
    registry = ConstructorRegistry()
    registry.struct_rule(_with_field_docs)
    return parse(type(default), default=default, description=description, args=args, registry=registry)


def report_error(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """A `sys.excepthook`: ValueError and OSError are one red line and exit code 2, Ctrl-C is exit code 130.

    Anything else is a fault in the program and keeps its traceback, as everything does where RAYTRON_DEBUG is set.
    """
    if os.environ.get("RAYTRON_DEBUG") or not issubclass(kind, ValueError | OSError | KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    if kind is KeyboardInterrupt:
        raise SystemExit(130)
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\033[31m{error}\033[0m" if colour else error, file=sys.stderr)
    raise SystemExit(2)


def _with_field_docs(info: Any) -> Any:
    """tyro's rule for dataclasses that have a default, with the sentence below each field as its help.

    By itself tyro finds those sentences too, but through `inspect`, which parses this whole file twice for every class:
    more than half of the time that `--help` takes.
    """
    from tyro.constructors import StructConstructorSpec, StructFieldSpec

    if not (dataclasses.is_dataclass(info.type) and isinstance(info.default, info.type)):
        return None
    docs: dict[str, str] = {}
    for cls in reversed(info.type.__mro__[:-1]):
        docs |= _field_docs(cls.__module__).get(cls.__name__, {})
    specs = (
        StructFieldSpec(name=name, type=hint, default=getattr(info.default, name), helptext=docs.get(name))
        for name, hint in _hints(info.type).items()
    )
    return StructConstructorSpec(instantiate=info.type, fields=tuple(specs))


@functools.cache
def _field_docs(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the string below it, for the classes of a module, from one parse of its source."""
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        for declared, below in itertools.pairwise(node.body if isinstance(node, ast.ClassDef) else ()):
            match declared, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs.setdefault(node.name, {})[name] = " ".join(text.split())
    return docs


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON-ready dict of a config; `from_dict` reads it back."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Build `cls` from plain values (as JSON gives them), nested dataclasses included.

    Raises:
        ValueError: unknown key, or a value of the wrong type; names the key and what was expected.
    """
    _require(isinstance(values, Mapping), f"{where} is {values!r}; expected the fields of {cls.__name__}")
    hints = _hints(cls)
    for key in values:
        _require(key in hints, f"{where}: unknown key {key!r}; {cls.__name__} has {', '.join(hints)}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint`, or a ValueError that says where and what was expected."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _first_fit(options, value, where)
    if origin is Literal:
        _require(value in options, f"{where} is {value!r}; expected one of {', '.join(map(repr, options))}")
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        return from_dict(hint, value, where)
    if origin in (tuple, list):
        _require(isinstance(value, list | tuple), f"{where} is {value!r}; expected a list")
        kinds = [options[0]] * len(value) if origin is list or options[-1] is ... else options
        _require(len(kinds) == len(value), f"{where} is {value!r}; expected {len(kinds)} values")
        pairs = zip(kinds, value, strict=True)
        return origin(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))
    if origin is dict:
        _require(isinstance(value, Mapping), f"{where} is {value!r}; expected a mapping")
        return {_convert(options[0], k, where): _convert(options[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    fits = value is None if hint is types.NoneType else isinstance(value, hint)
    _require(fits and (hint is bool or not isinstance(value, bool)), f"{where} is {value!r}; expected {hint.__name__}")
    return value


def _first_fit(options: tuple, value: Any, where: str) -> Any:
    exact = [o for o in options if isinstance(o, type) and type(value) is o]
    others = [o for o in options if o is not types.NoneType]
    if value is None and len(others) < len(options):
        return None
    for option in (*exact, *others):
        try:
            return _convert(option, value, where)
        except ValueError:
            if len(others) == 1:
                raise
    kinds = ("None" if o is types.NoneType else o.__name__ if isinstance(o, type) else str(o) for o in options)
    raise ValueError(f"{where} is {value!r}; expected {' or '.join(kinds)}")

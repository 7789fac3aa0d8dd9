"""What an RL run is told: frozen dataclasses as in `raytron.config`. Neither torch nor ray."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raytron.config import (
    EngineConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScalingConfig,
    StepConfig,
    Typed,
)

__all__ = [
    "AlgorithmConfig",
    "JudgeConfig",
    "RLConfig",
    "RLEvalConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "TaskConfig",
]


@dataclass(frozen=True)
class AlgorithmConfig(Typed):
    """Which policy-gradient algorithm, and its numbers; None leaves a number to the algorithm, whose file states it.

    Raises ValueError for a number out of range. A field that the algorithm would not read is refused by the algorithm.
    """

    name: str = "grpo"
    """grpo | dr_grpo | dapo | gspo | cispo | rloo | reinforce_pp | reinforce_pp_baseline | ppo."""
    clip_low: float | None = None
    """The ratio is clipped at 1 - clip_low; 1 turns the lower bound off."""
    clip_high: float | None = None
    """The ratio is clipped at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound of ratio x advantage where the advantage is negative (Ye et al. 2020), above 1; 0 turns it off."""
    kl: Literal["none", "reward", "loss"] | None = None
    """Where the KL divergence to the reference model is charged."""
    kl_coefficient: float | None = None
    """What a nat of it costs."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """k1 in the reward; k2 or k3 (times the ratio) in the loss: see `raytron.rl.kl`."""
    entropy_coefficient: float | None = None
    """What a nat of the whole distribution's entropy earns in the loss."""
    reduction: Literal["token", "sequence", "constant"] | None = None
    """Mean over tokens; over sequences of their mean over tokens; sum over tokens / (sequences x constant_length)."""
    constant_length: int | None = None
    """The longest response: divisor of the constant reduction, and where the overlong penalty is whole."""
    normalize_std: bool | None = None
    """Divide advantages by the rewards' deviation in the group, or (REINFORCE++, PPO) whiten them over the batch."""
    correction: (
        Literal["none", "tis", "sequence-tis", "icepop", "mask-token", "mask-sequence", "mask-sequence-product"] | None
    ) = None
    """What happens to tokens that trainer and engine judge differently: see `raytron.rl.corrections`."""
    correction_low: float | None = None
    """Lower bound of trainer's / engine's probability."""
    correction_high: float | None = None
    """Upper bound of the same."""
    decoupled: bool | None = None
    """The ratio's denominator is the trainer's own log-probability when the step began (True) or the engine's."""
    gamma: float | None = None
    """Discount per chosen token (REINFORCE++, PPO)."""
    lam: float | None = None
    """GAE's lambda (PPO)."""
    value_clip: float | None = None
    """The critic's estimate may move so far in a step (PPO); 0 turns it off."""
    dynamic_sampling: bool | None = None
    """Leave out groups whose rewards are all alike, and sample others in their place."""
    overlong_buffer: int | None = None
    """Responses are charged for coming so near to constant_length; 0 turns it off."""
    overlong_penalty: float | None = None
    """What a response of constant_length or more is charged."""
    overlong_filtering: bool | None = None
    """Truncated responses count in rewards and denominators but are not learned from."""
    epochs: int = 1
    """Times a batch is trained on."""
    minibatches: int = 1
    """Optimizer updates of one epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"constant_length": 1, "epochs": 1, "minibatches": 1}
        most = {"clip_low": 1.0, "gamma": 1.0, "lam": 1.0}
        for name, value in vars(self).items():
            if isinstance(value, int | float):
                low, high = least.get(name, 0), most.get(name, math.inf)
                if not (low <= value <= high and math.isfinite(value)):
                    raise ValueError(f"algorithm.{name} is {value}; it must lie between {low} and {high}")
        if self.dual_clip is not None and 0 < self.dual_clip <= 1:
            raise ValueError(f"algorithm.dual_clip is {self.dual_clip}; it must exceed 1 (3 is usual), or be 0")

    @property
    def stated(self) -> dict[str, Any]:
        """The fields that an algorithm may choose, where they are given."""
        optional = (f.name for f in dataclasses.fields(self) if f.default is None)
        return {name: getattr(self, name) for name in optional if getattr(self, name) is not None}

    def filled(self, defaults: Mapping[str, Any]) -> AlgorithmConfig:
        """With `defaults` for what is not stated. ValueError for what is, yet has no default: nothing would read it."""
        unused = [name for name, value in self.stated.items() if defaults.get(name) is None]
        if unused:
            raise ValueError(
                f"algorithm {self.name}, set up like this, does not use {', '.join(unused)}; leave it out, or turn on "
                "what it belongs to (kl, correction, overlong_buffer)"
            )
        return dataclasses.replace(self, **{**defaults, **self.stated})


@dataclass(frozen=True)
class TaskConfig(Typed):
    """What is to be learnt."""

    name: str = "echo-digit"
    """echo-digit | copy | reverse | countdown | higher-lower | calculator | gsm8k."""
    options: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Fields of the task (`raytron.rl.tasks`): `length 6 digits 4` for copy, `path train.jsonl` for gsm8k."""


@dataclass(frozen=True)
class RolloutConfig(Typed):
    """Engines that write answers, and how they sample."""

    engines: int | tuple[int, int] = 1
    """How many, each in a placement group of its own, or colocated; one number, or the fewest and the most: as many as
    find seats then, more when nodes appear, and fewer when they go."""
    colocate: bool = False
    """Engines share the seats of the policy's trainer, one of their ranks that of one of its, and take turns with it:
    no CPU or GPU is asked for besides. max_staleness must be 0."""
    release: Literal["cache", "weights"] = "cache"
    """What colocated engines give back while the trainer computes: the memory of their caches, or that of their weights
    too, which come back with the push."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What each is; its path, dtype and lora are the policy's."""
    cpus: float = 1.0
    """CPU slots of one rank of an engine, unless colocated."""
    gpus: float = 0.0
    """GPUs of one rank of an engine, unless colocated."""
    temperature: float = 1.0
    top_p: float = 1.0
    """Below 1 the engine's distribution is not the trained one; ratios are then wrong by what was cut off."""
    top_k: int = 0
    timeout_s: float = 600.0
    """For each step of an environment; an episode where one takes longer is left out of the batch."""
    engine_timeout_s: float = 600.0
    """An engine that does not answer for so long, or has work and makes no progress, is ended and started again; above
    the longest step (a prefill of engine.max_batched_tokens) and the longest weight update."""
    max_restarts: int = 3
    """How often a dead engine is started again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.bounds
        if not 1 <= low <= high:
            raise ValueError(f"rollout.engines is {self.engines}; it must be at least 1, and min <= max")
        if self.colocate and low < high:
            raise ValueError(
                f"rollout.engines is {self.engines}, and colocated engines share seats of the trainer, which are there "
                "for the whole run; give one number"
            )
        if self.colocate and (self.cpus, self.gpus) != (1.0, 0.0):
            raise ValueError(
                f"rollout.cpus {self.cpus} and rollout.gpus {self.gpus} are not what colocated engines take: they use "
                "what the trainer's ranks have (scaling.use_gpu, scaling.resources_per_worker); leave them out"
            )
        if self.release != "cache" and not self.colocate:
            raise ValueError(f"rollout.release is {self.release}, which colocated engines do; set rollout.colocate too")
        if self.engine_timeout_s <= 0:
            raise ValueError(f"rollout.engine_timeout_s is {self.engine_timeout_s}; it must be positive")
        if self.temperature <= 0:
            raise ValueError(
                f"rollout.temperature is {self.temperature}; it must be positive: a policy that always takes the "
                "likeliest token has nothing to compare (evaluation.temperature may be 0)"
            )

    @property
    def bounds(self) -> tuple[int, int]:
        """(fewest, most) engines."""
        return self.engines if isinstance(self.engines, tuple) else (self.engines, self.engines)


@dataclass(frozen=True)
class RewardModelConfig(Typed):
    """A sequence classifier (LlamaForSequenceClassification and the like) that scores whole answers, in actors."""

    path: str | None = None
    """Hugging Face directory; None is no reward model."""
    weight: float = 1.0
    """What its score counts."""
    label: int | None = None
    """Which of its scores, where it gives more than one."""
    template: str | None = None
    """What it reads: text with {prompt} and {response}, or "chat" for its own chat template, both in its own tokens;
    None gives it the policy's tokens as they are, for a model with the policy's tokenizer."""
    replicas: int = 1
    """How many, each in a placement group of its own."""
    tp: int = 1
    """Tensor parallel size of each."""
    cpus: float = 1.0
    """CPU slots of one rank."""
    gpus: float = 0.0
    """GPUs of one rank."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is what the model's config.json says."""
    max_batch_tokens: int = 16384
    """Computed side by side, padding included."""
    timeout_s: float = 120.0
    """A replica that takes longer for what it was given is ended and started again, and its answers scored again."""
    max_restarts: int = 3
    """How often a dead replica is started again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("replicas", "tp", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"reward.model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.timeout_s <= 0:
            raise ValueError(f"reward.model.timeout_s is {self.timeout_s}; it must be positive")


@dataclass(frozen=True)
class JudgeConfig(Typed):
    """A language model behind an OpenAI endpoint that grades answers (`raytron.rl.rewards.LLMJudge`)."""

    url: str | None = None
    """Up to and including /v1; None is no judge."""
    model: str = ""
    """Its name there."""
    weight: float = 1.0
    """What its score, from 0 to 1, counts."""
    template: str | None = None
    """The question, with {prompt}, {answer} (the reference) and {response}; by default a grade from 0 to 10."""
    pattern: str | None = None
    """Regular expression whose group 1 is the score; by default the number behind "Score:"."""
    best: float = 10.0
    """The highest score."""
    api_key_env: str | None = None
    """Environment variable with the key; the run's files never hold it."""
    concurrency: int = 16
    """Answers judged at once."""
    request: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Further fields of each request: `temperature 0.2 max_tokens 256`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.url is not None and not self.model:
            raise ValueError("reward.judge.model is empty; name the model that the endpoint serves")
        if self.concurrency < 1 or self.best <= 0:
            raise ValueError("reward.judge: concurrency must be at least 1, and best positive")


@dataclass(frozen=True)
class RewardConfig(Typed):
    """What an episode is worth besides, or instead of, the task's own verdict: the weighted sum of what is named.

    Where any part of it cannot be had, the answer is left out of the batch and counted; it is not worth zero.
    """

    task: float | None = None
    """Weight of the task's own verdict; by default 1, and 0 where a model or a judge is named."""
    model: RewardModelConfig = field(default_factory=RewardModelConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    timeout_s: float = 600.0
    """An answer whose reward takes longer is left out of the batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timeout_s <= 0:
            raise ValueError(f"reward.timeout_s is {self.timeout_s}; it must be positive")


@dataclass(frozen=True)
class RLEvalConfig(Typed):
    """Evaluation on prompts of its own, every `interval` steps and at the end."""

    interval: int = 0
    """0 evaluates at the end only."""
    prompts: int = 64
    samples: int = 1
    """Answers to each prompt; with more, pass@k and best-of-k are reported up to it."""
    temperature: float = 0.0


@dataclass(frozen=True)
class RLConfig(StepConfig):
    """A whole RL run: policy, task, algorithm, rollouts, how to train, on what, and where its output goes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    prompts: int = 32
    """Groups of a step."""
    group_size: int = 8
    """Answers to each prompt."""
    max_staleness: int = 0
    """Versions an answer's oldest token may be behind: 0 is synchronous, 1 one step off, n asynchronous."""
    micro_batch_tokens: int = 8192
    """Tokens one rank works on at a time."""
    packing: bool = False
    """Several answers behind each other in a row, instead of padded rows of similar length."""
    share_prompts: bool = True
    """With packing: compute a prompt once for all of its answers in a row (not in reproducible mode)."""
    reproducible: bool = False
    """Trainer and native engines compute with the same bits; the CPU only."""
    critic: OptimizerConfig | None = None
    """The critic's optimizer, where the algorithm has one; by default the policy's."""
    evaluation: RLEvalConfig = field(default_factory=RLEvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    transcripts: int = 20
    """Steps between samples of answers in transcripts.html; 0 writes none."""
    run: RunConfig = field(default_factory=lambda: RunConfig(name="rl"))
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    resume: bool = True
    """Continue from the newest checkpoint under storage_path/name when there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompts", "group_size", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness is {self.max_staleness}; it must be 0 or more")
        if self.rollout.colocate:
            self._check_colocation()
        if self.algorithm.minibatches > self.prompts * self.group_size:
            raise ValueError(
                f"algorithm.minibatches {self.algorithm.minibatches} exceeds the step's prompts x group_size answers"
            )

    def _check_colocation(self) -> None:
        """ValueError for what engines and trainer cannot do in turns."""
        engine, engines, ranks = self.rollout.engine, self.rollout.bounds[1], self.scaling.bounds[0]
        if self.max_staleness:
            raise ValueError(
                f"max_staleness is {self.max_staleness}, and rollout.colocate has engines and trainer take turns: set "
                "it to 0, or give the engines seats of their own (rollout.colocate off)"
            )
        if engines * engine.tp * engine.pp > ranks:
            raise ValueError(
                f"rollout.colocate: {engines} engines of tp x pp = {engine.tp} x {engine.pp} ranks share the seats "
                f"of the trainer, which has {ranks} (scaling.num_workers); use fewer or smaller engines, or more ranks"
            )
        if engine.engine == "vllm" and not self.scaling.gpus_per_worker:
            raise ValueError(
                "rollout.colocate: vLLM gives memory back on a GPU only (its sleep mode), and scaling asks for none; "
                "set rollout.engine.engine to native, scaling.use_gpu, or rollout.colocate off"
            )

    @property
    def updates(self) -> int:
        """Optimizer steps of one RL step."""
        return self.algorithm.minibatches * self.algorithm.epochs

    def dp(self, num_workers: int | None = None) -> int:
        """Data-parallel size with `num_workers` ranks (by default the largest the run may have)."""
        workers, unit = (
            self.scaling.bounds[1] if num_workers is None else num_workers,
            self.parallel.tp * self.parallel.pp,
        )
        if workers % unit:
            raise ValueError(
                f"scaling.num_workers {workers} is not divisible by parallel tp x pp = {self.parallel.tp} x "
                f"{self.parallel.pp}; use a multiple of {unit}"
            )
        return workers // unit

"""A whole GRPO step, against TRL's GRPOTrainer: answers, rewards, advantages, an update, and the weights back.

A random Llama of 25M parameters, 8 prompts of 32 random tokens, 8 answers to each; both use all cores. Fixed lengths:
64 tokens an answer. Long-tailed: one token in 32 ends an answer, at most 256 are written, so the longest of a step's
64 answers is some five times the mean. Both sides train on the same number of answers with AdamW, without KL; rewards
are a share of even token ids. Ours is a run of `raytron.rl` as users start it: driver, trainer actor and engine actor.
TRL generates with transformers (its vLLM asks for another release of it), once with one micro-batch of 64 and once
with four of 16; the better counts. Each run is a process of its own; they take turns.

Floor at fixed lengths: 64 x 96 tokens through 25M parameters, 6 FLOPs each in training and 2 in generation: 1.2 TFLOP;
0.9 where a prompt is computed once for its eight answers, as ours does on both sides and TRL does on neither.

    python benchmarks/grpo_step.py [--quick] [--dtypes fp32,bf16] [--rounds 3]     needs: pip install 'trl>=1.16,<2'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from _common import ROOT, emit, parse, write_results

BENCHMARK = "grpo_step"
VOCAB, PROMPTS, GROUP = 4096, 8, 8
ENDS = VOCAB // 32  # ids that end an answer, in the long-tailed case
WARM_UP = 2  # steps of every run that do not count
SIZES: dict[str, dict[str, int]] = {
    "toy": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    | {"num_attention_heads": 1, "num_key_value_heads": 1},
    "25M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Kind:
    """How long prompts and answers are."""

    name: str
    prompt: int
    most: int
    tailed: bool = False


KINDS = {
    "fixed": Kind("fixed", 32, 64),
    "tailed": Kind("tailed", 32, 256, tailed=True),
    "toy": Kind("toy", 4, 4),
}


def target(kind: Kind, dtype: str) -> float:
    """The ratio the project wants."""
    return 3.0 if kind.tailed else 2.5 if dtype == "bf16" else 2.0


def make_model(size: str, kind: Kind, folder: str) -> str:
    """A Hugging Face directory: random weights, and a tokenizer whose words are numbers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    words = {"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    path = f"{folder}/{size}-{kind.name}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    set_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=512, pad_token_id=0, **SIZES[size])
    model = LlamaForCausalLM(config)
    ends = list(range(1, 1 + ENDS)) if kind.tailed else None
    model.config.eos_token_id = model.generation_config.eos_token_id = ends
    model.generation_config.bos_token_id = model.config.bos_token_id = None
    model.save_pretrained(path)
    return path


def prompt_ids(index: int, length: int) -> list[int]:
    """Prompt `index`, the same on both sides."""
    import random

    return random.Random(index).choices(range(1 + ENDS, VOCAB), k=length)


def even(token_ids: Sequence[int]) -> float:
    """The reward: the share of even ids."""
    return sum(token % 2 == 0 for token in token_ids) / max(1, len(token_ids))


# ------------------------------------------------------------------------------------------------------------ the sides


def ours(path: str, kind: Kind, dtype: str, steps: int, micro: int) -> list[dict[str, float]]:
    """Seconds of each step, in all and by phase, and the tokens chosen."""
    from raytron import rl
    from raytron.config import (
        CheckpointConfig,
        EngineConfig,
        LoggingConfig,
        ModelConfig,
        OptimizerConfig,
        RunConfig,
        ScheduleConfig,
    )
    from raytron.rl.config import AlgorithmConfig, RLConfig, RLEvalConfig, RolloutConfig
    from raytron.rl.environments import Prompt, SingleTurn
    from raytron.rl.rewards import judged

    async def reward(prompt: Prompt, answer: Any) -> float:
        return even(answer.token_ids)

    class Numbers:
        eos_token_ids = tuple(range(1, 1 + ENDS)) if kind.tailed else ()
        stop_token_ids, stop, max_tokens, vocab_size = (), (), kind.most, VOCAB

        def prompt(self, index: int) -> Prompt:
            return Prompt(index, tuple(prompt_ids(index, kind.prompt)))

        def evaluation(self) -> list[Prompt]:
            return [self.prompt(0)]

        def environment(self) -> SingleTurn:
            return SingleTurn(judged(reward))

        def decode(self, token_ids: Sequence[int], special: bool = False) -> str:
            return " ".join(map(str, token_ids))

        def save_tokenizer(self, directory: str | os.PathLike[str]) -> None:
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(path).save_pretrained(directory)

    engine = EngineConfig(max_num_seqs=64, max_batched_tokens=2048, kv_cache_mb=256, threads=os.cpu_count())
    with tempfile.TemporaryDirectory(prefix="raytron-grpo-step-") as storage:
        config = RLConfig(
            model=ModelConfig(path=path),
            algorithm=AlgorithmConfig(name="grpo"),
            rollout=RolloutConfig(engine=engine),
            prompts=PROMPTS,
            group_size=GROUP,
            steps=steps,
            precision=dtype,
            micro_batch_tokens=2048,
            packing=True,
            optimizer=OptimizerConfig(lr=1e-5, min_lr=0.0, weight_decay=0.0),
            schedule=ScheduleConfig(kind="constant"),
            evaluation=RLEvalConfig(prompts=1),
            logging=LoggingConfig(tensorboard=False),
            transcripts=0,
            run=RunConfig(name="step", storage_path=storage, checkpoint_config=CheckpointConfig(interval=0)),
        )
        result = rl.run(config, task=Numbers())
        lines = map(json.loads, (Path(result.path) / "metrics.jsonl").read_text().splitlines())
        return [
            {
                "step": line["step_time_s"],
                "tokens": line["extra"]["rollout/response_length_mean"] * PROMPTS * GROUP,
                **line["phases_s"],
            }
            for line in lines
            if line["kind"] == "train"
        ]


def trl(path: str, kind: Kind, dtype: str, steps: int, micro: int) -> list[dict[str, float]]:
    """The same of TRL; "rollout" is its generation."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    taken: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            taken.append({"step": time.perf_counter(), "rollout": 0.0, "tokens": 0.0})

        def on_step_end(self, *_: Any, **__: Any) -> None:
            taken[-1]["step"] = time.perf_counter() - taken[-1]["step"]
            taken[-1]["train"] = taken[-1]["step"] - taken[-1]["rollout"]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        taken[-1]["tokens"] += sum(map(len, completion_ids))
        return [even(ids) for ids in completion_ids]

    prompts = [" ".join(map(str, prompt_ids(index, kind.prompt))) for index in range(PROMPTS * steps)]
    with tempfile.TemporaryDirectory(prefix="trl-grpo-step-") as output:
        config = GRPOConfig(
            output_dir=output,
            use_cpu=True,
            bf16=dtype == "bf16",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=PROMPTS * GROUP // micro,
            num_generations=GROUP,
            max_completion_length=kind.most,
            generation_kwargs={} if kind.tailed else {"min_new_tokens": kind.most},
            gradient_checkpointing=False,
            beta=0.0,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            max_steps=steps,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=path,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
            callbacks=[Clock()],
        )
        generate = trainer._generate_single_turn

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return generate(*args, **kwargs)
            finally:
                taken[-1]["rollout"] += time.perf_counter() - start

        trainer._generate_single_turn = timed
        trainer.train()
    return taken


SIDES = {"ours": ours, "trl": trl}


def run(side: str, path: str, kind: Kind, dtype: str, steps: int, micro: int = PROMPTS * GROUP) -> list[dict[str, Any]]:
    """A side's steps after the warm-up, from a process of its own."""
    command = [sys.executable, __file__, "--as", side, path, kind.name, dtype, str(steps), str(micro)]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])[min(WARM_UP, steps - 1) :]


# --------------------------------------------------------------------------------------------------------- measurements


def measure(size: str, kind: Kind, dtype: str, path: str, arguments: Any) -> dict[str, Any]:
    """The row of one case."""
    emulated = dtype == "bf16" and not _has_bf16()  # theirs then takes minutes a step
    steps, rounds = (2, 1) if size == "toy" or emulated else (WARM_UP + 3, 1 if arguments.quick else arguments.rounds)
    mine, theirs = [], {}
    for _ in range(rounds):
        mine += run("ours", path, kind, dtype, WARM_UP + 3 if emulated else steps)
        if find_spec("trl") is not None:
            for micro in (PROMPTS * GROUP,) if size == "toy" or emulated else (PROMPTS * GROUP, 16):
                theirs.setdefault(micro, []).extend(run("trl", path, kind, dtype, steps, micro))
    middle = {micro: median(step["step"] for step in found) for micro, found in theirs.items()}
    best = min(middle, key=middle.__getitem__, default=None)
    return emit(
        BENCHMARK,
        f"{size}-{dtype}-{kind.name}",
        median(step["step"] for step in mine),
        middle.get(best),
        None if best is None else f"TRL, micro-batches of {best}",
        unit="s",
        higher_is_better=False,
        details={
            "target": target(kind, dtype),
            "ours": split(mine, ("rollout", "score", "train", "sync")),
            "theirs": split(theirs[best], ("rollout", "train")) if best else "",
            "steps": f"{len(mine)} / {len(theirs.get(best, ()))}",
            "tokens": f"{median(s['tokens'] for s in mine):.0f}"
            + (f" / {median(s['tokens'] for s in theirs[best]):.0f}" if best else ""),
            "others cpu": round(arguments.others_cpu, 2),
        },
    )


def split(steps: Sequence[dict[str, Any]], phases: Sequence[str]) -> str:
    """Seconds by phase, in the middle of all steps."""
    return " + ".join(f"{phase} {median(step.get(phase, 0.0) for step in steps):.2f}" for phase in phases)


def _has_bf16() -> bool:
    from raytron.precision import NATIVE_BF16

    return NATIVE_BF16


def main() -> None:
    arguments = parse(__doc__.splitlines()[0], size="25M", dtypes="fp32,bf16", rounds=3)
    if find_spec("trl") is None:
        print("TRL is not installed: rows have no ratio", file=sys.stderr)
    rows = []
    dtypes = ["fp32"] if arguments.quick or arguments.size == "toy" else arguments.dtypes.split(",")
    with tempfile.TemporaryDirectory(prefix="raytron-grpo-step-") as folder:
        for kind in [KINDS["toy"]] if arguments.size == "toy" else [KINDS["fixed"], KINDS["tailed"]]:
            path = make_model(arguments.size, kind, folder)
            rows += [measure(arguments.size, kind, dtype, path, arguments) for dtype in dtypes]
    if arguments.output or not (arguments.quick or arguments.size == "toy"):
        write_results(arguments.output or Path(__file__).parent / "results" / f"{BENCHMARK}.md", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as"]:
        side, path, kind, dtype, steps, micro = sys.argv[2:]
        print(json.dumps(SIDES[side](path, KINDS[kind], dtype, int(steps), int(micro))))
    else:
        main()

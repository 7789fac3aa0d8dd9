"""What asynchrony is worth when answers take unequal time: staleness 1 and 2 against 0, at equal final reward.

Echo-digit from random weights, with GRPO, in an environment that takes its time to judge, as tests and tools do: 20 ms
for half of the answers, a second for one in a hundred (log-normal). With staleness 0 every step waits for the slowest
of its 256 answers; with more, the next batches are under way meanwhile. The same prompts, seeds and number of
steps; one trainer actor and one engine, a thread each. Runs take turns.

    python benchmarks/async.py [--quick] [--steps 100]
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from _common import ROOT, emit, parse, write_results

sys.path.insert(0, str(ROOT))

from raytron.rl.environments import Generated, Prompt, SingleTurn, StepResult
from raytron.rl.tasks import EchoDigit

BENCHMARK = "async"
MEDIAN_S, P99_S, LONGEST_S = 0.02, 1.0, 2.0


class Slow(SingleTurn):
    """Judges after a while."""

    async def reset(self, prompt: Prompt) -> tuple[int, ...]:
        self._index = prompt.index
        return await super().reset(prompt)

    async def step(self, answer: Generated) -> StepResult:
        spread = math.log(P99_S / MEDIAN_S) / 2.326  # of the normal distribution's 99 %
        chance = random.Random(f"{self._index} {answer.token_ids}")
        await asyncio.sleep(min(LONGEST_S, chance.lognormvariate(math.log(MEDIAN_S), spread)))
        return await super().step(answer)


@dataclass(frozen=True)
class SlowEcho(EchoDigit):
    """Echo-digit with it."""

    def environment(self) -> SingleTurn:
        return Slow(self._judge)


def once(staleness: int, steps: int, seed: int, storage: str) -> dict[str, float]:
    """One run: seconds of its steps, and what was learnt."""
    from raytron import rl
    from raytron.config import CheckpointConfig, RunConfig
    from recipes.grpo import config

    config = replace(
        config,
        steps=steps,
        seed=seed,
        max_staleness=staleness,
        transcripts=0,
        evaluation=replace(config.evaluation, interval=0),
        run=RunConfig(f"{staleness}-{seed}", storage_path=storage, checkpoint_config=CheckpointConfig(interval=0)),
    )
    start = time.perf_counter()
    with redirect_stdout(sys.stderr):
        result = rl.run(config, task=SlowEcho(seed=seed))
    lines = map(json.loads, (Path(result.path) / "metrics.jsonl").read_text().splitlines())
    records = [line for line in lines if line["kind"] == "train"]
    rewards = [record["extra"]["rollout/reward_mean"] for record in records[-10:]]
    return {
        "steps_s": sum(record["step_time_s"] for record in records),
        "wall_s": time.perf_counter() - start,
        "reward": sum(rewards) / len(rewards),
        "greedy": result.metrics["eval/reward"],
        "staleness": records[-1]["extra"]["rollout/staleness_max"],
    }


def row(
    staleness: int, runs: Sequence[dict[str, float]], base: Sequence[dict[str, float]], steps: int
) -> dict[str, Any]:
    def middle(found: Sequence[dict[str, float]], name: str) -> float:
        return median(run[name] for run in found)

    return emit(
        BENCHMARK,
        f"echo-digit fp32 staleness {staleness}",
        middle(runs, "steps_s"),
        middle(base, "steps_s"),
        "staleness 0",
        unit="s",
        higher_is_better=False,
        details={
            "steps": steps,
            "reward": " / ".join(f"{run['reward']:.3f}" for run in runs),
            "reward at 0": " / ".join(f"{run['reward']:.3f}" for run in base),
            "greedy": " / ".join(f"{run['greedy']:.2f}" for run in runs),
            "greedy at 0": " / ".join(f"{run['greedy']:.2f}" for run in base),
        },
    )


def main() -> None:
    arguments = parse(__doc__.splitlines()[0], steps=100)
    steps, seeds = (min(20, arguments.steps), 1) if arguments.quick else (arguments.steps, 3)
    from raytron.actors import Session

    runs: dict[int, list[dict[str, float]]] = {0: [], 1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="raytron-async-") as storage, Session(8):
        for seed in range(seeds):
            for staleness, found in runs.items():
                found.append(once(staleness, steps, seed, storage))
    rows = [row(staleness, runs[staleness], runs[0], steps) for staleness in (1, 2)]
    if arguments.output or not arguments.quick:
        write_results(arguments.output or Path(__file__).parent / "results" / f"{BENCHMARK}.md", rows)


if __name__ == "__main__":
    main()

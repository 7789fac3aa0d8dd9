"""Whether RL learns: every algorithm, the tasks, late answers and other engines, from random weights, over seeds.

A policy of 0.1M parameters starts from noise; a case is a recipe with a few fields changed, run whole (driver, trainer
actor, engine actor) for each seed. It passes when for every seed the mean reward of the last ten steps and the greedy
evaluation on prompts of its own are both at least what the table names. No peer: the gates are the project's.

    python benchmarks/learning.py [--quick] [--seeds 3] [--only WORD]     (quick: one seed of the first case)

Needs no quiet machine: what is measured is reward, and seconds stand beside it for information.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from _common import ROOT, emit, parse, write_results

BENCHMARK = "learning"
LAST = 10  # steps whose mean reward counts


@dataclass(frozen=True)
class Case:
    """A recipe with fields of its configuration changed; least rewards of the last steps, and of the evaluation."""

    name: str
    recipe: str = "grpo"
    algorithm: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    heads: int | None = None
    least: float = 0.95
    greedy: float = 1.0

    @property
    def settings(self) -> str:
        """In words; what is not said is as in the recipe."""
        said = [f"recipes/{self.recipe}.py", *(f"{name} {value}" for name, value in self.changes.items())]
        if self.algorithm is not None:
            said += [f"algorithm {self.algorithm}", f"entropy_coefficient {FAMILY[self.algorithm]}"]
        said += [f"{name} {value}" for name, value in self.engine.items()]
        return "; ".join(said + ([f"attention heads {self.heads}"] if self.heads else []))


# Algorithm -> entropy coefficient. Where advantages are not divided by their deviation, the same one weighs more.
FAMILY = {"dr_grpo": 0.06, "dapo": 0.1, "gspo": 0.1, "cispo": 0.1, "rloo": 0.05}
FAMILY |= {"reinforce_pp": 0.1, "reinforce_pp_baseline": 0.1, "ppo": 0.1}
STEPS = {"dr_grpo": 100, "ppo": 150}
CASES = (
    Case("echo-digit grpo"),
    Case("echo-digit grpo staleness 2", changes={"steps": 100, "max_staleness": 2}),
    Case("echo-digit grpo vLLM", engine={"engine": "vllm"}, heads=2),  # of 32, the least its attention takes on a CPU
    *(Case(f"echo-digit {name}", algorithm=name, changes={"steps": STEPS.get(name, 60)}) for name in FAMILY),
    Case("copy-4 grpo", recipe="async_grpo", changes={"steps": 300, "max_staleness": 0}, least=0.99, greedy=0.99),
    Case("copy-4 ppo", recipe="ppo", least=0.99, greedy=0.99),
    Case("copy-4 grpo staleness 2", recipe="async_grpo", least=0.99, greedy=0.99),
    Case("higher-lower grpo", recipe="agent_tools", least=0.72, greedy=0.0),
)


def config_of(case: Case, seed: int, steps: int | None, storage: str) -> Any:
    """The run's configuration."""
    from raytron.config import CheckpointConfig, RunConfig
    from raytron.rl.config import AlgorithmConfig

    sys.path[:0] = [str(ROOT)]
    config = __import__(f"recipes.{case.recipe}", fromlist=["config"]).config
    changes = dict(case.changes)
    if case.algorithm is not None:
        changes["algorithm"] = AlgorithmConfig(name=case.algorithm, entropy_coefficient=FAMILY[case.algorithm])
    if case.engine:
        changes["rollout"] = replace(config.rollout, engine=replace(config.rollout.engine, **case.engine))
    if case.heads is not None:
        heads = {"num_attention_heads": case.heads, "num_key_value_heads": case.heads // 2}
        changes["model"] = replace(config.model, overrides={**config.model.overrides, **heads})
    name = f"{case.name.replace(' ', '-')}-{seed}"
    run = RunConfig(name=name, storage_path=storage, checkpoint_config=CheckpointConfig(interval=0))
    config = replace(config, seed=seed, run=run, transcripts=0, **changes)
    return replace(config, steps=steps) if steps else config


def learn(case: Case, seed: int, steps: int | None, storage: str) -> dict[str, Any]:
    """One run: the rewards of its steps, the greedy evaluation's, and its seconds."""
    from raytron import rl

    start = time.perf_counter()
    with redirect_stdout(sys.stderr):
        result = rl.run(config_of(case, seed, steps, storage))
    lines = map(json.loads, (Path(result.path) / "metrics.jsonl").read_text().splitlines())
    # Of all that was sampled: dynamic sampling trains on no group that is solved.
    rewards = [line["extra"]["rollout/reward_sampled_mean"] for line in lines if line["kind"] == "train"]
    return {
        "rewards": rewards,
        "last": sum(rewards[-LAST:]) / len(rewards[-LAST:]),
        "greedy": result.metrics["eval/reward"],
        "seconds": time.perf_counter() - start,
    }


def row(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    passed = all(run["last"] >= case.least and run["greedy"] >= case.greedy for run in runs)
    return emit(
        BENCHMARK,
        case.name,
        sum(run["last"] for run in runs) / len(runs),
        unit="reward",
        details={
            "passed": passed,
            "target": f"{case.least:g} of each seed" + (f" and greedy {case.greedy:g}" if case.greedy else ""),
            "last 10": " / ".join(f"{run['last']:.3f}" for run in runs),
            "greedy": " / ".join(f"{run['greedy']:.3f}" for run in runs),
            "steps": len(runs[0]["rewards"]),
            "settings": case.settings,
            "seconds": " / ".join(f"{run['seconds']:.0f}" for run in runs),
        },
    )


def draw(path: Path, curves: Mapping[str, list[dict[str, Any]]]) -> None:
    """Rewards by step, a panel a case, a line a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(4, len(curves))
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.2 * lines), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for at, (name, runs) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(lines, columns, at)
        for run in runs:
            axes.plot(run["rewards"], linewidth=1.1)
        axes.set_title(name, fontsize=9)
        axes.set_ylim(0, 1.02)
        axes.spines[["right", "top"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.8)
    figure.savefig(path)


def main() -> None:
    arguments = parse(__doc__.splitlines()[0], ["--force", *sys.argv[1:]], seeds=3, only="", steps=0)
    cases = [case for case in CASES if arguments.only in case.name]
    seeds = arguments.seeds
    if arguments.quick:
        cases, seeds = cases[:1], 1
    from raytron.actors import Session

    page = arguments.output or Path(__file__).parent / "results" / f"{BENCHMARK}.md"
    rows, curves = [], {}
    with tempfile.TemporaryDirectory(prefix="raytron-learning-") as storage, Session(8):
        for case in cases:
            runs = curves[case.name] = [learn(case, seed, arguments.steps or None, storage) for seed in range(seeds)]
            rows.append(row(case, runs))
            if arguments.output or not (arguments.quick or arguments.only):  # again with each: the table takes long
                draw(page.with_suffix(".png"), curves)
                write_results(page, rows, notes=f"![rewards by step]({page.with_suffix('.png').name})")


if __name__ == "__main__":
    main()

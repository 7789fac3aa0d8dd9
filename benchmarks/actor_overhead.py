"""What hosting an engine in Ray actors costs: the step time of a `TrainerGroup` against the same task under torchrun.

Both sides run the same `PretrainTask` (data, engine, metrics) on the same mesh with the same threads a rank. Ours is
timed where a user would time it, in the driver, from the first message to the last step's metrics; the peer inside its
own rank 0, with nothing to talk to: whatever its pipe costs is not counted. Start-up is measured by neither.

The two live side by side and step in turns, one block each. torchrun's ranks wait on a FIFO, actors on Ray's queue, so
whoever is not measured uses no core. Rejected: two runs one after the other, between which the machine changes by more
than the three percent this is about. Each case is measured with three pairs of fresh processes: where the system puts a
process's pages moves its steps by up to four percent either way for as long as it lives, whoever it is.

Floor: a message of the group carries `per_message(step)` steps, at most a quarter of a second's work, and the next one
is always sent ahead; what is left is the driver's own work, about 1 ms a message and rank (0.4 % of a core), and no
bytes of tensors at all. The step itself: 6 x 4.6M weights x 2,048 tokens = 57 GFLOP and 18 (fp32) or 9 (bf16) MB of
gradients over gloo for dp2; 6 all-gathers and 6 reduce-scatters of 2 MB a micro-batch for tp2.

    python benchmarks/actor_overhead.py [--quick] [--size toy]
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import Samples, emit, interleave, parse, write_results

from raytron.config import DataConfig, ModelConfig, ParallelConfig, PretrainConfig, ScalingConfig, from_dict, to_dict

BENCHMARK = "actor_overhead"
ANSWER_S = 300.0
PAIRS = 3  # of processes a case

MODEL = {
    "num_hidden_layers": 6,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 704,
    "vocab_size": 4096,
}
TOY = {**MODEL, "num_hidden_layers": 2, "hidden_size": 64, "num_key_value_heads": 2, "intermediate_size": 128}


@dataclass(frozen=True)
class Case:
    """One comparison. `target`: its row carries a ratio."""

    precision: str
    dp: int = 1
    tp: int = 1
    pp: int = 1
    target: bool = True

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def name(self) -> str:
        axes = " ".join(f"{name}{n}" for name, n in (("dp", self.dp), ("tp", self.tp), ("pp", self.pp)) if n > 1)
        return f"{axes} {self.precision}"

    def config(self, steps: int, toy: bool) -> PretrainConfig:
        """What both sides run: Megatron's mock data, which costs no tokenizing."""
        return PretrainConfig(
            model=ModelConfig(preset="llama-3m", overrides={**(TOY if toy else MODEL), "tie_word_embeddings": False}),
            data=DataConfig(mock=True, tokenizer="null:4095", sequence_length=32 if toy else 256),
            parallel=ParallelConfig(tp=self.tp, pp=self.pp),
            precision=self.precision,
            global_batch_size=8,
            micro_batch_size=8 // self.dp // (4 if self.pp > 1 else 1),
            steps=steps,
            scaling=ScalingConfig(num_workers=self.ranks),
        )


QUICK = (Case("fp32", dp=2), Case("bf16", dp=2), Case("fp32", tp=2))
FULL = (*QUICK, Case("bf16", tp=2), Case("fp32", tp=2, pp=2, target=False))


# ---------------------------------------------------------------------------------------------------------- both sides


def task_of(world: Any, config: PretrainConfig, cache: str) -> Any:
    """The task of one rank; the driver has prepared the data already."""
    from raytron.data import prepare
    from raytron.models import resolve
    from raytron.training.task import PretrainTask

    prepared = prepare(config.data, cache, progress=False)
    return PretrainTask(world, config, resolve(config.model), prepared, f"{cache}/checkpoints")


class Actors:
    """The task in a `TrainerGroup`."""

    def __init__(self, config: PretrainConfig, threads: int, cache: str) -> None:
        from raytron.actors import TrainerGroup
        from raytron.parallel.mesh import Mesh

        mesh = Mesh(dp=config.dp(), pp=config.parallel.pp, tp=config.parallel.tp)
        self._group = TrainerGroup(mesh, config.scaling, threads=threads)
        self._group.create(task_of, config, cache)

    def steps(self, count: int) -> float:
        """Seconds a step, over `count`."""
        start = time.perf_counter()
        done = sum(1 for _ in self._group.steps(count))
        assert done == count, f"{done} of {count} steps came back"
        return (time.perf_counter() - start) / count

    def close(self) -> None:
        self._group.shutdown()


class Torchrun:
    """The task under `torchrun`, told through a FIFO per rank how many steps to take, answering through another."""

    def __init__(self, config: PretrainConfig, threads: int, cache: str, folder: Path) -> None:
        ranks = range(config.scaling.bounds[1])
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        self._asks = [_fifo(folder / f"ask-{rank}", "w") for rank in ranks]
        self._answers = [_fifo(folder / f"answer-{rank}", "r") for rank in ranks]
        self._log = folder / "log"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", len(ranks)]
        command += [__file__, "--rank-of", folder, "--threads", threads, "--cache", cache]
        with self._log.open("w") as log:
            self._job = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)

    def ready(self) -> None:
        """Wait until every rank has its engine."""
        self._hear()

    def steps(self, count: int) -> float:
        """Seconds a step, over `count`, by rank 0's own clock."""
        self._tell(count)
        return float(self._hear()[0])

    def close(self) -> None:
        """End the job: by asking, or, when a rank does not leave, by a signal that torchrun passes on."""
        self._tell(0)
        try:
            self._job.wait(30)
        except subprocess.TimeoutExpired:
            self._job.terminate()
            self._job.wait()
        for pipe in (*self._asks, *self._answers):
            pipe.close()

    def _tell(self, count: int) -> None:
        for asks in self._asks:
            asks.write(f"{count}\n")

    def _hear(self) -> list[str]:
        return [self._line(answers) for answers in self._answers]

    def _line(self, answers: Any) -> str:
        deadline = time.monotonic() + ANSWER_S
        while not select.select([answers], [], [], 1.0)[0]:
            if self._job.poll() is not None or time.monotonic() > deadline:
                log = self._log.read_text()  # what torchrun itself adds at the end says less than the first traceback
                raise RuntimeError(f"the torchrun job does not answer:\n{log[max(log.find('Traceback'), 0) :][:4000]}")
        return answers.readline()


def _fifo(path: Path, mode: str) -> Any:
    """A new FIFO, opened for both ways: that never waits for another end, nor reports its end when that one leaves."""
    os.mkfifo(path)
    return os.fdopen(os.open(path, os.O_RDWR), mode, buffering=1 if mode == "w" else -1)


def rank_main(argv: Sequence[str]) -> None:
    """One rank of the torchrun job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank-of", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache")
    arguments = parser.parse_args(argv)
    import torch

    from raytron.parallel.collectives import World
    from raytron.parallel.mesh import Mesh

    torch.set_num_threads(arguments.threads)
    config = from_dict(PretrainConfig, json.loads((arguments.rank_of / "config.json").read_text()))
    world = World.from_env(Mesh(dp=config.dp(), pp=config.parallel.pp, tp=config.parallel.tp))
    task = task_of(world, config, arguments.cache)
    with (
        (arguments.rank_of / f"ask-{world.rank}").open() as asks,
        (arguments.rank_of / f"answer-{world.rank}").open("w", buffering=1) as answers,
    ):
        answers.write("ready\n")
        while count := int(asks.readline()):
            start = time.perf_counter()
            for _ in range(count):
                task.train_step()
            answers.write(f"{(time.perf_counter() - start) / count}\n")
    task.close()
    world.close()


# ----------------------------------------------------------------------------------------------------------- measuring


@contextmanager
def sides(config: PretrainConfig, threads: int, cache: str) -> Iterator[tuple[Actors, Torchrun]]:
    """Both sides, ready to step."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peer = Torchrun(config, threads, cache, folder)
        stack.callback(peer.close)
        ours = Actors(config, threads, cache)
        stack.callback(ours.close)
        peer.ready()
        yield ours, peer


def measure(case: Case, rounds: int, block_s: float, toy: bool, cache: str) -> dict[str, Any]:
    """One case's row."""
    from raytron.actors.worker import cores
    from raytron.data import prepare

    threads = max(1, cores() // case.ranks)
    most = 400
    config = case.config(most * (rounds + 2), toy)
    prepare(config.data, cache, progress=False)
    block, found = 0, []
    for _ in range(1 if toy else PAIRS):
        with sides(config, threads, cache) as (ours, peer):
            for side in (ours, peer, ours):
                side.steps(4)  # the first steps pay for warming up
            block = block or min(max(4, round(block_s / peer.steps(4))), most)
            found += [interleave({"ours": lambda: ours.steps(block), "peer": lambda: peer.steps(block)}, rounds)]  # noqa: B023
    return row_of(case, found, block, threads)


def row_of(case: Case, found: Sequence[dict[str, Samples]], block: int, threads: int) -> dict[str, Any]:
    ours, peer = (Samples(tuple(t for pair in found for t in pair[side].values)) for side in ("ours", "peer"))
    # Machine drift hits neighbouring blocks alike: the median of their ratios is steadier than that of the times.
    pairs = Samples(tuple(p / o for o, p in zip(ours.values, peer.values, strict=True)))
    return emit(
        BENCHMARK,
        case.name,
        ours.median,
        peer.median,
        "the same task under torchrun",
        unit="s/step",
        higher_is_better=False,
        for_information=not case.target,
        details={
            "target": 0.97 if case.target else "none",
            "median of paired ratios": round(pairs.median, 4),
            "by pair of processes": [round(pair["peer"].median / pair["ours"].median, 3) for pair in found],
            "spread": f"{ours.spread:.1%} / {peer.spread:.1%}",
            "rounds": len(ours.values),
            "steps a block": block,
            "threads a rank": threads,
        },
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse("Step time in the actor group against the same task under torchrun.", argv, size="full")
    toy = arguments.size == "toy"
    from raytron.actors import Session

    cases = QUICK[:1] if toy else QUICK if arguments.quick else FULL
    rounds, block_s = (2, 0.1) if toy else (2, 1.0) if arguments.quick else (7, 2.0)  # of each pair
    with tempfile.TemporaryDirectory() as cache, Session(slots=max(case.ranks for case in cases)):
        rows = [measure(case, rounds, block_s, toy, f"{cache}/{i}") for i, case in enumerate(cases)]
    if arguments.output:
        write_results(arguments.output, rows)


if __name__ == "__main__":
    if "--rank-of" in sys.argv:
        rank_main(sys.argv[1:])
    else:
        main()

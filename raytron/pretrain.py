"""The driver of a pretraining run: check, prepare the data once, start the actors, step, evaluate, save, sum up.

    driver:  check -> prepare data -> Ray -> actors -> load -> [ steps -> evaluate -> save ]* -> summary
    actors:  every rank reads its own samples and trains its shard (`PretrainTask`); the driver sees only metrics

Ctrl-C and SIGTERM finish the steps under way, save and return; a second Ctrl-C leaves at once. When ranks are lost the
others go on with what they hold, at the step they were at (elastic.py); where that is not possible the actors start
again from the newest checkpoint. `failure_config.max_failures` says how often.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console

from raytron.actors import CapacityError, Session, TrainerGroup, from_ray_train, result
from raytron.actors.control import Control
from raytron.actors.elastic import Elastic, Rewound
from raytron.actors.journal import PAGE
from raytron.actors.moves import Job
from raytron.actors.placement import Node, cluster, ranks_that_fit
from raytron.actors.policy import Rules, Unit
from raytron.actors.runs import Failures, RunFolder, attempts, first_line, stop_requests
from raytron.actors.trainer import resources
from raytron.config import PretrainConfig, RunConfig, ScalingConfig
from raytron.data import build_datasets, load_tokenizer, prepare, unigram_entropy
from raytron.metrics import (
    EvalRecord,
    MetricsWriter,
    StepRecord,
    loss_curve_png,
    read_records,
    summary_table,
)
from raytron.models.registry import resolve
from raytron.parallel.mesh import Mesh
from raytron.training.memory import MemoryEstimate, estimate_memory
from raytron.training.seating import Holdings, Seating, at_risk, covered, seat
from raytron.training.task import PretrainTask, sample_counts

if TYPE_CHECKING:
    import ray.train

__all__ = ["Run", "run"]

log = logging.getLogger(__name__)

VOCABULARY_SLACK = 1024  # rows a published model may have beyond its tokenizer's entries


def run(
    config: PretrainConfig,
    *,
    run_config: RunConfig | ray.train.RunConfig | None = None,
    scaling_config: ScalingConfig | ray.train.ScalingConfig | None = None,
) -> ray.train.Result:
    """Pretrain as `config` says, on Ray actors, and return Ray Train's result.

    Args:
        config: the whole run.
        run_config, scaling_config: Ray Train's own objects (or raytron's), instead of `config.run`, `config.scaling`.

    Returns:
        `metrics` of the last step and the held-out loss, the newest `checkpoint` (its `model` folder is a Hugging Face
        directory), and the run's `path`. A run stopped by Ctrl-C or SIGTERM returns too, after saving.

    Raises:
        ValueError: a configuration, data set or checkpoint that cannot work, before actors start where possible.
        CapacityError: the cluster cannot hold the run, in ranks or in memory.
        WorkerError: actors failed more often than `failure_config.max_failures`.
    """
    return Run.of(config, run_config, scaling_config).drive()


@dataclass
class _Progress:
    """What the driver remembers for the summary."""

    first: StepRecord | None = None
    last: StepRecord | None = None
    held_out: EvalRecord | None = None
    seconds: float = 0.0
    tokens: float = 0.0

    def step(self, record: StepRecord) -> None:
        if self.last is not None:  # the first step of a process pays for warming up
            self.seconds += record.step_time_s
            self.tokens += record.tokens_per_s * record.step_time_s
        self.first, self.last = self.first or record, record


class Run:
    """One run, from its checks to its summary. Another kind of training has another task, and says what it is on.

    Attributes:
        task: what every rank runs: `task(world, config, arch, prepared, checkpoints)`, with the methods of
            `PretrainTask`.
        prepared: what ranks are told of the data, once `prepare` has made it.
    """

    task: type = PretrainTask

    def __init__(self, config: PretrainConfig) -> None:
        self.config, self.console = config, Console()
        self.arch = self.architecture()
        self.arch.check_sequence(config.data.sequence_length)
        parallel = config.parallel
        self.mesh = Mesh(dp=config.dp(), pp=parallel.pp, tp=parallel.tp)
        self.memory = estimate_memory(self.arch, self.mesh, config, config.data.sequence_length)
        self.folder = RunFolder(config.run)
        self.progress = _Progress()
        self.folder.refuse_overwriting(config.resume)

    @classmethod
    def of(
        cls,
        config: PretrainConfig,
        run_config: RunConfig | ray.train.RunConfig | None = None,
        scaling_config: ScalingConfig | ray.train.ScalingConfig | None = None,
    ) -> Run:
        """A run, with Ray Train's own objects where they are given."""
        if run_config is not None:
            config = replace(config, run=from_ray_train(run_config))
        if scaling_config is not None:
            config = replace(config, scaling=from_ray_train(scaling_config))
        return cls(config)

    def architecture(self) -> Any:
        """The model's."""
        return resolve(self.config.model)

    def prepare(self, cache: str) -> None:
        """Do with the data what is to be done once; ranks then read it from `cache`. May complete the configuration."""
        data = self.config.data
        if not data.tokenizer.startswith("bpe:"):  # before the whole corpus is tokenized with a wrong one
            check_vocabulary(load_tokenizer(data.tokenizer).vocab_size, self.arch.vocab_size)
        self.prepared = prepare(data, cache)
        # Build the sample indices, so that ranks only map them; keep the held-out part for the summary.
        _, self.held_out, _ = build_datasets(data, self.prepared, *sample_counts(self.config))

    def source(self) -> str:
        """The data, in words."""
        data = self.config.data
        if not (data.path or data.blend):
            return "mock data"
        source = data.path or f"blend of {len(data.blend)}"
        return f"{source}, {self.prepared.tokens:,} tokens in {self.prepared.documents:,} documents"

    def unigram(self) -> float | None:
        """What the held-out loss is compared with, in nats."""
        return None if self.held_out is None else unigram_entropy(self.held_out)

    def show(self, checkpoint: str | None) -> None:
        """Show what the trained model does, below the summary."""

    def drive(self) -> ray.train.Result:
        """The whole run."""
        start = time.perf_counter()
        self.prepare(os.environ.get("RAYTRON_CACHE") or str(self.folder.path / "data"))
        check_vocabulary(self.prepared.vocab_size, self.arch.vocab_size)
        self.folder.describe(self.config)
        with Session(slots=self.mesh.size + self.config.scaling.spares) as session, stop_requests() as stop:
            self.mesh = replace(self.mesh, dp=fitting_dp(self.config, cluster()))
            self._announce()
            refuse_if_too_big(self.memory, self.mesh, self.config)
            config, name, path = self.config, self.config.run.name, self.folder.path
            told = (config.elastic, config.steps, self.say, sizes(config), not session.owned)
            with Control(name, path, *told) as control:
                allowed = config.run.failure_config.max_failures
                failures = Failures(allowed, control.past.failures, control.failed)
                once = partial(self._attempt, session, control, failures, stop)
                checkpoint = attempts(once, config.run, config.resume, stop, self.say, failures)
        return self._finish(checkpoint, time.perf_counter() - start)

    def _attempt(
        self, session: Session, control: Control, failures: Failures, stop: threading.Event, resume: bool
    ) -> str | None:
        told = (self.config, self.arch, self.prepared, self.folder.checkpoints)
        again = control.past.interrupted or failures.count > 0
        patience_s = self.config.elastic.wait_s if again and not session.owned else 0.0
        with self._group(session.wait_s, patience_s, control, stop) as group, control.watching(group):
            group.create(self.task, *told)
            step, damaged = group.load() if resume else (0, [])
            elastic = self._elastic(group, control, failures, stop)
            self._warn(group)
            while True:
                try:
                    return self._go_on(elastic, step, damaged, stop)
                except Rewound as back:
                    step, damaged = back.step, back.damaged

    def _group(self, wait_s: float, patience_s: float, control: Control, stop: threading.Event) -> TrainerGroup:
        """Actors on as many seats as there are now; with patience nodes are waited for where there are too few."""
        config, until = self.config, time.monotonic() + patience_s
        while True:
            self.mesh = fitting_mesh(config, self.arch, cluster()) if patience_s else self.mesh
            try:
                return TrainerGroup(self.mesh, config.scaling, wait_s=wait_s)
            except CapacityError as error:
                if time.monotonic() >= until or stop.is_set():
                    raise
                control.note("waiting", why=first_line(error))

    def _elastic(self, group: TrainerGroup, control: Control, failures: Failures, stop: threading.Event) -> Elastic:
        config, arch, elastic = self.config, self.arch, self.config.elastic
        job = Job(
            newcomer=partial(_newcomer, self.task, config, arch, self.prepared, self.folder.checkpoints),
            covered=partial(covered, config, arch),
            seat=partial(seat, config, arch),
            fits=partial(fits, config, arch),
        )
        return Elastic(
            group,
            job,
            control,
            bounds=config.scaling.bounds,
            shapes=shapes(config, arch),
            most_dp=config.global_batch_size // config.micro_batch_size,
            failures=failures,
            rules=Rules(hold_s=elastic.hold_s, wait_s=elastic.wait_s, spares=config.scaling.spares),
            stop=stop,
            in_place=elastic.in_place,
        )

    def _warn(self, group: TrainerGroup) -> None:
        """Say what no second node holds, where a failure is to be survived and there are several nodes."""
        nodes = {member.name: member.where.node for member in group.members}
        if self.config.run.failure_config.max_failures == 0 or len(set(nodes.values())) == 1:
            return
        alone = at_risk(self.config, self.arch, Seating(group.mesh, tuple(nodes)), nodes.__getitem__)
        if any(alone.values()):
            self.say(
                f"each of {len(alone)} nodes has up to {max(alone.values()) / 1e6:,.1f} MB that no other has; losing "
                "it takes the run back to its newest checkpoint (parallel.twins keeps a second copy of shards)"
            )

    def _go_on(self, elastic: Elastic, step: int, damaged: Sequence[str], stop: threading.Event) -> str | None:
        """From `step` to the end; where the newest checkpoint is."""
        for problem in damaged:
            self.say(f"passed over a damaged checkpoint: {problem}")
        if step:
            self.say(f"continuing from step {step} of {self.folder.checkpoints}", style="")
        with MetricsWriter(self.folder.sinks(self.config, self.console, step)) as writer:
            self._loop(elastic, writer, step, stop)
        return elastic.call("call", "latest")[0]

    def _loop(self, elastic: Elastic, writer: MetricsWriter, step: int, stop: threading.Event) -> None:
        """Steps up to each milestone, then what is due there; at the end always an evaluation and a save."""
        config = self.config
        evaluate_every, save_every = config.evaluation.interval, config.run.checkpoint_config.interval
        due = [n for n in (evaluate_every, save_every) if n > 0]
        while step < config.steps and not stop.is_set():
            milestone = min(config.steps, *(step - step % n + n for n in due)) if due else config.steps
            for record in elastic.steps(step, milestone - step, stop.is_set):
                self.progress.step(record)
                writer.write(record)
                self.say(record.notice)
                step = record.step
            end = step == config.steps or stop.is_set()
            # The evaluation's record is on disk before the checkpoint it belongs to exists: a resume keeps both.
            if not stop.is_set() and (end or (evaluate_every and step % evaluate_every == 0)):
                self._evaluate(elastic, writer)
            if end or (save_every and step % save_every == 0):
                self.say(elastic.call("save", wait=end))
                elastic.saved()

    def say(self, what: str | None, style: str = "yellow") -> None:
        """Print a line as it is: paths are not broken."""
        if what:
            self.console.print(what, style=style, markup=False, highlight=False, soft_wrap=True)

    def _evaluate(self, elastic: Elastic, writer: MetricsWriter) -> None:
        record = elastic.call("evaluate")
        if record is not None:
            self.progress.held_out = record
            writer.write(record)

    def _announce(self) -> None:
        mesh, config, lora = self.mesh, self.config, self.arch.lora
        adapters = f"adapters of rank {lora.rank} beside {', '.join(lora.targets)}, " if lora.rank else ""
        self.console.print(
            f"[bold]{config.run.name}[/]: {self.arch.family} of {config.model.path or config.model.preset}, {adapters}"
            f"{mesh.size} ranks = dp {mesh.dp} x pp {mesh.pp} x tp {mesh.tp}, {config.precision}\n"
            f"data: {self.source()}, vocabulary {self.prepared.vocab_size:,}\nmemory: about {self.memory}",
            highlight=False,
        )

    def _finish(self, checkpoint: str | None, wall_s: float) -> ray.train.Result:
        folder = self.folder.path
        metrics_file, picture = folder / "metrics.jsonl", folder / "loss.png"
        unigram = self.unigram() if self.progress.held_out else None
        if read_records(metrics_file):
            loss_curve_png(metrics_file, picture, unigram=unigram)
        progress, last = self.progress, self.progress.last
        if last is not None:
            files = {"model": f"{checkpoint}/model"} if checkpoint else {}
            files |= {"loss curve": picture, "metrics": metrics_file, "what happened": folder / PAGE, "run": folder}
            table = summary_table(
                name=self.config.run.name,
                tokens=last.consumed_tokens,
                first_loss=progress.first.loss,
                last_loss=last.loss,
                tokens_per_s=progress.tokens / progress.seconds if progress.seconds else last.tokens_per_s,
                wall_s=wall_s,
                held_out_loss=progress.held_out.loss if progress.held_out else None,
                unigram=unigram,
                files=files,
            )
            self.console.print(table)
            self.show(checkpoint)
        self.folder.upload()
        return result(self._metrics(unigram), checkpoint, str(self.folder.storage))

    def _metrics(self, unigram: float | None) -> dict[str, Any]:
        last, held_out = self.progress.last, self.progress.held_out
        metrics = {} if last is None else {k: v for k, v in vars(last).items() if not isinstance(v, dict)}
        if held_out is not None:
            metrics["eval_loss"] = held_out.loss
        if unigram is not None:
            metrics["unigram_entropy"] = unigram
        return metrics


def _newcomer(task: type, config: PretrainConfig, arch: Any, prepared: Any, checkpoints: str, world: None) -> Any:
    """A rank's task that joins a run."""
    return task(world, config, arch, prepared, checkpoints, fresh=True)


def shapes(config: PretrainConfig, arch: Any) -> tuple[Unit, ...]:
    """Shapes of a replica that the model can have: the configured one, then smaller ones made by halving it."""
    parallel = config.parallel
    if parallel.virtual_stages > 1 or parallel.layers_per_stage is not None:
        return (Unit(parallel.pp, 1, parallel.tp),)
    sizes = ((parallel.tp >> i, parallel.pp >> j) for i in range(8) for j in range(8))
    found = dict.fromkeys(Unit(pp, 1, tp) for tp, pp in sizes if tp and pp and fits(config, arch, tp, pp))
    return tuple(sorted(found, key=lambda unit: (-unit.size, -unit.tp)))


def fits(config: PretrainConfig, arch: Any, tp: int, pp: int) -> bool:
    """Whether the model can be cut into tp x pp parts."""
    mesh = Mesh(pp=pp, tp=tp)
    try:
        Holdings(config, arch, Seating(mesh, tuple(map(str, range(mesh.size)))))
    except ValueError:
        return False
    return True


def check_vocabulary(entries: int, vocab_size: int) -> None:
    """ValueError where the tokenizer's ids do not fit the model, or the model has far more rows than ids."""
    if entries <= vocab_size <= entries + VOCABULARY_SLACK:
        return
    raise ValueError(
        f"the tokenizer has {entries} entries and the model's vocab_size is {vocab_size}; set "
        f"`vocab_size {entries}` in model.overrides for a new model, or name the model's own tokenizer in "
        "data.tokenizer"
    )


def fitting_dp(config: PretrainConfig, nodes: Sequence[Node]) -> int:
    """The largest dp that `scaling.num_workers` allows, the free seats hold, and the global batch has sequences for.

    Where not even the fewest ranks fit it is that of the most: placing them says what was asked and what is there.
    """
    unit = Unit(config.parallel.pp, 1, config.parallel.tp)
    return _most_dp(config, nodes, unit) or config.scaling.bounds[1] // unit.size


def fitting_mesh(config: PretrainConfig, arch: Any, nodes: Sequence[Node]) -> Mesh:
    """The same for a run that goes on, which takes another shape where the configured one does not fit; where nothing
    fits, the fewest ranks that may."""
    units = shapes(config, arch)
    for unit in units:
        if dp := _most_dp(config, nodes, unit):
            return Mesh(dp=dp, pp=unit.pp, tp=unit.tp)
    low, high = config.scaling.bounds
    unit = min(units, key=lambda unit: -(-low // unit.size) * unit.size)
    return Mesh(dp=min(-(-low // unit.size), high // unit.size), pp=unit.pp, tp=unit.tp)


def _most_dp(config: PretrainConfig, nodes: Sequence[Node], unit: Unit) -> int:
    """0 where not even the fewest ranks fit."""
    low, high = config.scaling.bounds
    free = ranks_that_fit(nodes, resources(config.scaling), unit.tp)
    for workers in range(min(high, free) // unit.size * unit.size, low - 1, -unit.size):
        if workers // unit.size * config.micro_batch_size <= config.global_batch_size:
            return workers // unit.size
    return 0


def sizes(config: PretrainConfig) -> dict[str, Any]:
    """What users may change while it runs, as it is configured; JSON."""
    return {"num_workers": list(config.scaling.bounds), "tp": config.parallel.tp, "pp": config.parallel.pp}


def refuse_if_too_big(memory: MemoryEstimate, mesh: Mesh, config: PretrainConfig) -> None:
    """CapacityError where the ranks' estimated memory exceeds what the cluster's nodes (or this GPU) have."""
    if config.scaling.use_gpu:
        import torch

        room = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        if room is not None and memory.total > room:
            raise CapacityError(f"a rank needs about {memory}, a GPU here has {room / 2**30:.2f} GiB. {_MEND}")
        return
    nodes = [node.total.get("memory", 0.0) for node in cluster()]
    needed, there = memory.total * mesh.size, sum(nodes)
    if needed > there:
        raise CapacityError(
            f"{mesh.size} ranks need about {memory}, {needed / 2**30:.2f} GiB in all; the cluster's {len(nodes)} nodes "
            f"offer {there / 2**30:.2f} GiB. {_MEND}"
        )


_MEND = "Use more ranks (tp, pp, or dp with zero), recompute, a smaller micro_batch_size or model"

"""The driver of an RL run: roll out, judge, train, push weights; one loop, whatever the algorithm and the asynchrony.

    engines  --tokens-->  Rollouts + Buffer + Journal  --batch-->  trainer actors  --weights-->  engines

How far rollouts run ahead of the training is a bound (`max_staleness`), not another loop: the buffer admits groups, and
while the trainer computes, the event loop here goes on serving episodes.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from raytron.actors import Session, WorkerError, from_ray_train, result
from raytron.actors.control import Control
from raytron.actors.demand import bundles
from raytron.actors.placement import cluster
from raytron.actors.rollout import RolloutGroup
from raytron.actors.rollout_scaling import EngineScaler
from raytron.actors.runs import RunFolder, attempts, stop_requests
from raytron.actors.trainer import resources
from raytron.actors.weight_sync import WeightSync
from raytron.config import ElasticConfig, RunConfig, ScalingConfig
from raytron.data import HFTokenizer, load_tokenizer
from raytron.inference.types import SamplingParams
from raytron.metrics import EvalRecord, MetricsWriter, StepRecord
from raytron.models.registry import resolve
from raytron.parallel.mesh import Mesh
from raytron.rl.algorithms import make
from raytron.rl.buffer import Buffer, Journal
from raytron.rl.config import RLConfig
from raytron.rl.engines import engine_bundles, fitting_dp, rollout_group, trainers_turn, watched
from raytron.rl.environments import Prompt, Task
from raytron.rl.episodes import run_group
from raytron.rl.report import TIMELINE, Phases, draw_timeline, reward_curve_png, step_record, summary
from raytron.rl.rewards import Overall, Reward
from raytron.rl.rollouts import Rollouts, why_unjudged
from raytron.rl.scorers import Scorers
from raytron.rl.statistics import success_statistics
from raytron.rl.tasks import build
from raytron.rl.trainers import Trainers
from raytron.rl.transcripts import add_transcripts
from raytron.rl.types import Batch, Group

if TYPE_CHECKING:
    import ray.train

__all__ = ["run"]


def run(
    config: RLConfig,
    *,
    task: Task | None = None,
    reward: Reward | None = None,
    run_config: RunConfig | ray.train.RunConfig | None = None,
    scaling_config: ScalingConfig | ray.train.ScalingConfig | None = None,
) -> ray.train.Result:
    """Train a policy by reinforcement as `config` says, on Ray actors, and return Ray Train's result.

    Args:
        config: the whole run.
        task: an own task (see `raytron.rl.environments.Task`) instead of the built-in one that `config.task` names.
        reward: an own `async (prompt, answer) -> float` (see `raytron.rl.rewards`) that judges whole episodes, besides
            what `config.reward` names; the task's own verdict then counts as `config.reward.task` says.
        run_config, scaling_config: Ray Train's own objects (or raytron's), instead of `config.run`, `config.scaling`.

    Returns:
        `metrics` of the last step and the last evaluation, the newest `checkpoint` (its `model` folder is a Hugging
        Face directory), and the run's `path`. A run stopped by Ctrl-C or SIGTERM returns too, after saving.

    Raises:
        ValueError: a configuration, task or checkpoint that cannot work, before actors start where possible.
        CapacityError: the cluster cannot hold the run.
        WorkerError: trainer actors failed more often than `failure_config.max_failures`.
    """
    if run_config is not None:
        config = replace(config, run=from_ray_train(run_config))
    if scaling_config is not None:
        config = replace(config, scaling=from_ray_train(scaling_config))
    return _Run(config, task or build(config.task, config.seed, config.model.path), reward).drive()


class _Run:
    """One run, from its checks to its summary."""

    def __init__(self, config: RLConfig, task: Task, reward: Reward | None) -> None:
        longest = config.algorithm.constant_length or task.max_tokens
        config = replace(config, algorithm=replace(config.algorithm, constant_length=longest))
        self.config, self.task, self.console = config, task, Console()
        self.arch = _architecture(config, task)
        self.scorers = Scorers(config, task, reward)
        self.overall: Overall | None = None
        self.algorithm = make(config.algorithm)
        self.mesh = Mesh(dp=config.dp(), pp=config.parallel.pp, tp=config.parallel.tp)
        self.fitted = 0  # dp of the last attempt
        self.folder = RunFolder(config.run)
        self.folder.refuse_overwriting(config.resume)
        self.first: StepRecord | None = None
        self.last: StepRecord | None = None
        self.evaluated: EvalRecord | None = None
        self.saved = 0

    def drive(self) -> ray.train.Result:
        start = time.perf_counter()
        self.folder.describe(self.config)
        self.tokenizer = self.folder.path / "tokenizer"
        self.task.save_tokenizer(self.tokenizer)
        _refuse_other_tokenizer(self.config.model.path, self.tokenizer)
        groups = 1 + self.algorithm.needs_critic
        rollout, run = self.config.rollout, self.config.run
        fewest, most = ([*engine_bundles(rollout, count), *self.scorers.bundles] for count in rollout.bounds)
        slots = self.mesh.size * groups + math.ceil(sum(bundle.get("CPU", 0) for bundle in most))
        sizes = {"engines": list(rollout.bounds)}
        told = (ElasticConfig(), self.config.steps, self._say, sizes)
        with (
            Session(slots) as session,
            stop_requests() as stop,
            Control(run.name, self.folder.path, *told, autoscaled=not session.owned) as control,
        ):

            def attempt(resume: bool) -> str | None:
                self._fit(groups, fewest, session.wait_s)
                try:
                    return asyncio.run(self._attempt(session, control, stop, resume))
                except WorkerError as error:
                    control.note("trainer failed", reason=str(error).partition("\n")[0])
                    raise

            checkpoint = attempts(attempt, run, self.config.resume, stop, self._say)
        return self._finish(checkpoint, time.perf_counter() - start)

    def _fit(self, groups: int, others: Sequence[Mapping[str, float]], wait_s: float) -> None:
        """Choose how many ranks train, where that was not given, and say so; fewer than before once a node is lost.

        A failed attempt's seats are not free at once: they are waited for, `wait_s` at most.
        """
        (low, high), before, start = self.config.scaling.bounds, self.fitted, time.monotonic()
        while (dp := fitting_dp(self.config, groups, others, cluster())) != before and before:
            if time.monotonic() - start > wait_s:
                break
            time.sleep(0.1)
        self.fitted, self.mesh = dp, replace(self.mesh, dp=dp)
        if low < high and dp != before:
            mesh = self.mesh
            self._say(
                f"training on {mesh.size} ranks, of {low} to {high}: dp {mesh.dp} x pp {mesh.pp} x tp {mesh.tp}", ""
            )

    async def _attempt(self, session: Session, control: Control, stop: threading.Event, resume: bool) -> str | None:
        config, checkpoints = self.config, self.folder.checkpoints
        args = (config, self.arch, self.mesh, self.algorithm, checkpoints, self.tokenizer, self._say, session.wait_s)
        with Trainers(*args) as trainers:
            version = trainers.load() if resume else 0
            self.saved = version
            if version:
                self._say(f"continuing from step {version} of {checkpoints}", style="")
            self.control = control
            control.seated(trainers.policy)
            await trainers.sleep()
            journal, buffer = self._books(version)
            told = (config, self.arch, self.task, self.folder, session.wait_s)
            requested = control.wish.get("engines")
            engines = rollout_group(*told, trainers.policy.berths, self.scorers.bundles, requested)
            lanes, file = self.scorers.lanes, self.folder.path / TIMELINE
            with watched(engines, lanes, file, keep=version > 0) as self.timeline:
                async with engines, self.scorers.running(session.wait_s, self.timeline) as self.overall:
                    sync = WeightSync(engines, trainers.policy, str(self.folder.path))
                    rollouts = Rollouts(buffer, journal, partial(self._roll, engines))
                    try:
                        with self.timeline.span("push", "sync", step=version):
                            await sync.push(version)
                        with MetricsWriter(self.folder.sinks(config, self.console, version)) as writer:
                            async with EngineScaler(engines, control, self._beside_engines()):
                                await self._loop(trainers, rollouts, engines, sync, writer, stop)
                    finally:
                        await rollouts.cancel()
                        journal.close()
                        await sync.close()
            return trainers.latest()

    def _beside_engines(self) -> list[dict[str, float]]:
        """What the run reserves besides engines: a tensor-parallel group of trainer ranks together, and judges."""
        groups = 1 + self.algorithm.needs_critic
        together = (self.mesh.tp,) * (groups * self.mesh.size // self.mesh.tp)
        return [*bundles(together, resources(self.config.scaling)), *self.scorers.bundles]

    def _books(self, version: int) -> tuple[Journal, Buffer]:
        """What has been rolled out so far, and what of it is still to be trained on."""
        config, journal = self.config, Journal(self.folder.path / "rollouts.jsonl")
        buffer = Buffer(
            config.prompts,
            config.steps,
            config.max_staleness,
            self.algorithm.keep,
            least=min(2, config.group_size),
            version=version,
        )
        for group in journal.recover():
            buffer.put(group)
        buffer.forget_trained()
        return journal, buffer

    async def _loop(
        self,
        trainers: Trainers,
        rollouts: Rollouts,
        engines: RolloutGroup,
        sync: WeightSync,
        writer: MetricsWriter,
        stop: threading.Event,
    ) -> None:
        config, buffer = self.config, rollouts.buffer
        while buffer.version < config.steps and not stop.is_set():
            phases = Phases(self.timeline, buffer.version + 1)
            with phases("rollout"):
                groups = await rollouts.next_batch(stop.is_set)
            if groups is None:
                break
            passed_over = buffer.passed_over()
            more = {"rejected": buffer.rejected, "excluded_total": rollouts.excluded, "ahead": len(buffer.started)}
            async with trainers_turn(config.rollout, trainers, engines):
                with phases("score"):
                    batch = await trainers.scored(Batch.of(groups))
                batch = self.algorithm.prepare(batch)
                rollouts.journal.step(buffer.version + 1, tuple(group.index for group in groups))
                with phases("train"):
                    metrics = await trainers.train(batch)
            with phases("sync"):
                report = await sync.push(buffer.version + 1)
                await engines.wake()
            buffer.trained()  # not before: what starts during the push may still be answered by the old weights
            rollouts.launch()
            more["sync_bytes"] = report.nbytes
            record = step_record(buffer.version, groups, batch, metrics, phases, more, passed_over)
            self._note(writer, record, groups)
            await self._milestone(trainers, engines, writer, buffer.version)
        if not stop.is_set() and (self.evaluated is None or self.evaluated.step < buffer.version):
            await self._evaluate(engines, writer, buffer.version)
        if self.saved != buffer.version:
            await self._save(trainers, buffer.version, wait=True)

    async def _roll(self, engines: RolloutGroup, index: int) -> Group:
        return await self._group(engines, self.task.prompt(index), self.config.group_size, self.config.seed)

    async def _group(
        self, engines: RolloutGroup, prompt: Prompt, samples: int, seed: int, temperature: float | None = None
    ) -> Group:
        rollout = self.config.rollout
        return await run_group(
            partial(engines.generate, group=prompt.index),
            self.task,
            prompt,
            SamplingParams(
                temperature=rollout.temperature if temperature is None else temperature,
                top_p=rollout.top_p,
                top_k=rollout.top_k,
            ),
            samples=samples,
            seed=seed,
            budget=self.arch.max_position_embeddings,
            timeout_s=rollout.timeout_s,
            overall=self.overall,
        )

    async def _milestone(self, trainers: Trainers, engines: RolloutGroup, writer: MetricsWriter, version: int) -> None:
        """An evaluation and a save where they are due."""
        evaluate_every, save_every = self.config.evaluation.interval, self.config.run.checkpoint_config.interval
        if evaluate_every and version % evaluate_every == 0:
            await self._evaluate(engines, writer, version)
        if save_every and version % save_every == 0:
            await self._save(trainers, version)

    async def _save(self, trainers: Trainers, version: int, wait: bool = False) -> None:
        with self.timeline.span("saves", "save", step=version):
            await trainers.save(wait)
        self.saved = version

    async def _evaluate(self, engines: RolloutGroup, writer: MetricsWriter, version: int) -> None:
        """The task's evaluation prompts, with seeds of their own."""
        options = self.config.evaluation
        prompts = self.task.evaluation()[: options.prompts]
        seed = self.config.seed + 1
        with self.timeline.span("evaluation", "evaluate", step=version):
            groups = await asyncio.gather(
                *(self._group(engines, prompt, options.samples, seed, options.temperature) for prompt in prompts)
            )
        judged = [group for group in groups if group.valid]
        if not judged:
            self._say(f"no answer of the evaluation could be judged: {why_unjudged(*groups)}")
            return
        rewards = np.concatenate([group.rewards for group in judged])
        found = {"reward": float(rewards.mean()), **success_statistics(judged)}
        tokens = sum(trajectory.length for group in judged for trajectory in group.valid)
        self.evaluated = EvalRecord(version, math.nan, math.nan, tokens, found)
        writer.write(self.evaluated)

    def _note(self, writer: MetricsWriter, record: StepRecord, groups: Sequence[Group]) -> None:
        """Write a step's record, and now and then what was answered."""
        self.first, self.last = self.first or record, record
        writer.write(record)
        self.control.stepped(record)
        self._say(record.notice)
        every = self.config.transcripts
        if every and (record.step == 1 or record.step % every == 0):
            add_transcripts(self.folder.path / "transcripts.html", record.step, groups, self.task.decode)

    def _say(self, what: str | None, style: str = "yellow") -> None:
        if what:
            self.console.print(what, style=style, markup=False, highlight=False, soft_wrap=True)

    def _finish(self, checkpoint: str | None, wall_s: float) -> ray.train.Result:
        folder, metrics = self.folder.path, {}
        if self.last is not None:
            picture, file = folder / "reward.png", folder / "metrics.jsonl"
            reward_curve_png(file, picture, title=self.config.run.name)
            files = {"model": f"{checkpoint}/model"} if checkpoint else {}
            files |= {"reward curve": picture, "metrics": file, "run": folder}
            page = folder / "transcripts.html"
            files |= {"transcripts": page} if page.exists() else {}
            files |= {"timeline": folder / "timeline.html"}
            name, busy = self.config.run.name, draw_timeline(folder, self.config.run.name)
            self.console.print(summary(name, self.first, self.last, self.evaluated, wall_s, busy, files))
            metrics = {k: v for k, v in vars(self.last).items() if not isinstance(v, dict | tuple)} | self.last.extra
        if self.evaluated is not None:
            metrics |= {f"eval/{name}": value for name, value in self.evaluated.extra.items()}
        self.folder.upload()
        return result(metrics, checkpoint, str(self.folder.storage))


def _architecture(config: RLConfig, task: Task) -> Any:
    """The model's; a new one takes the task's vocabulary. ValueError where a given one cannot hold it."""
    arch = resolve(config.model)
    if config.model.path is None:
        return arch.replace(vocab_size=task.vocab_size, eos_token_id=task.eos_token_ids or None, bos_token_id=None)
    if arch.vocab_size < task.vocab_size:
        raise ValueError(
            f"the task has token ids up to {task.vocab_size - 1} and the vocabulary of {config.model.path} ends at "
            f"{arch.vocab_size - 1}; give the task the model's own tokenizer"
        )
    return arch


def _refuse_other_tokenizer(model: str | None, tasks: Path) -> None:
    """ValueError where the tokenizer in a model's directory gives other ids than the task's."""
    if model is None or not Path(model, "tokenizer.json").is_file():
        return
    own, other = load_tokenizer(tasks), load_tokenizer(model)
    if not (isinstance(own, HFTokenizer) and isinstance(other, HFTokenizer)):
        return
    theirs = other.backend.get_vocab()
    for word, number in own.backend.get_vocab().items():
        if theirs.get(word) != number:
            raise ValueError(
                f"{word!r} is token {number} of the task and {theirs.get(word)} of {model}; give the task the model's "
                "own tokenizer, or start from a model that was trained with the task's"
            )

"""Policy and critic as a rank of their trainers sees them: batches in, weights out. Hosted by an actor or torchrun."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from raytron.checkpoint.publisher import Outgoing, Published, Publisher
from raytron.data.loader import MicroBatch
from raytron.models.base import ShardedModel
from raytron.models.loading import begin
from raytron.parallel.collectives import Axis, World
from raytron.rl.algorithms import make
from raytron.rl.config import RLConfig
from raytron.rl.objective import PolicyObjective, ValueObjective, token_logprobs
from raytron.rl.packing import beginnings, distribute, micro_batches
from raytron.rl.types import Batch
from raytron.training.engine import DTYPES, Judge, TrainEngine
from raytron.training.losses import Objective
from raytron.training.saves import Saves

__all__ = ["CriticTask", "PolicyTask", "Scores"]

log = logging.getLogger(__name__)

Scores = tuple[np.ndarray, np.ndarray]  # tokens of the batch, and a number for each


class _Task:
    """One rank of a model that is trained on batches.

    Every method is collective over the world, and every rank is given the same batch; which part of it is whose follows
    from its lengths. Results come from the ranks that know them, others return None.

    Attributes:
        model, engine: this rank's.
    """

    def __init__(
        self,
        world: World,
        config: RLConfig,
        model: ShardedModel,
        objective: Objective,
        checkpoints: str,
        tokenizer: str | None,
    ) -> None:
        self.world, self.config, self.model = world, config, model
        if config.reproducible:
            model.use_kernels(reproducible=True)
        self.engine = TrainEngine(model, replace(config, steps=config.steps * config.updates), objective)
        self.saves = Saves(self.engine, checkpoints, config.run.checkpoint_config, tokenizer)

    @property
    def version(self) -> int:
        """RL steps trained: what the weights are called."""
        return self.engine.counters.step // self.config.updates

    def load(self, most: int | None = None) -> tuple[int, list[str]]:
        """Continue from the newest good checkpoint (most: of this version or before), whatever its layout.

        Returns its version, 0 where there is none, and what was wrong with newer ones that were passed over.
        """
        damaged = self.saves.load(None if most is None else most * self.config.updates)
        return (0, []) if damaged is None else (self.version, damaged)

    def _score(self, batch: Batch, judge: Judge) -> Scores | None:
        """`judge`'s number for every token of this rank's trajectories, from the first tp rank of the last stage."""
        micro = self._micro_batches(batch)
        found = self.engine.score(micro, judge)
        if not found or self.world.coords.tp:
            return None
        index = torch.cat([m.fields_BS["index"].reshape(-1) for m in micro]).numpy()
        values = torch.cat(found).float().cpu().numpy()
        return index[index >= 0], values[index >= 0]

    def _train(self, parts: Sequence[Batch]) -> dict[str, float] | None:
        """An optimizer step on each of `parts`; metrics are their means."""
        start = time.perf_counter()
        results = [self.engine.step(self._micro_batches(part), samples=len(part)) for part in parts]
        if self.world.rank:
            return None
        for verdict in filter(None, (result.verdict for result in results)):
            log.warning("training version %d: %s", self.version, verdict)
        mean = {name: float(np.mean([r.sums[name] / r.tokens for r in results])) for name in results[0].sums}
        return mean | {
            "loss": float(np.mean([r.loss for r in results])),
            "grad_norm": float(np.mean([r.grad_norm for r in results])),
            "learning_rate": results[-1].learning_rate,
            "skipped": float(sum(r.skipped is not None for r in results)),
            "consumed_samples": self.engine.counters.consumed_samples,
            "consumed_tokens": self.engine.counters.consumed_tokens,
            "train_s": time.perf_counter() - start,
        }

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """This rank's share."""
        dp, parallel, config = self.world.axis("dp"), self.config.parallel, self.config
        sharing = config.packing and config.share_prompts and not config.reproducible
        shared = beginnings(batch) if sharing else None
        return micro_batches(
            batch,
            distribute(batch.lengths, dp.size, shared)[dp.index],
            config.micro_batch_tokens,
            packed=config.packing,
            shared=shared,
            multiple_of=parallel.tp if parallel.sequence_parallel else 1,
            count_of=parallel.pp if parallel.virtual_stages > 1 else 1,
        )

    def sleep(self) -> None:
        """See `TrainEngine.sleep`."""
        self.engine.sleep()

    def wake(self) -> None:
        """See `TrainEngine.wake`."""
        self.engine.wake()

    def save(self, wait: bool = False) -> str | None:
        """See `Saves.save`."""
        return self.saves.save(wait)

    def latest(self) -> str | None:
        """See `Saves.latest`."""
        return self.saves.latest()

    def close(self) -> None:
        """Finish saving."""
        self.saves.close()


class PolicyTask(_Task):
    """One rank of the policy's trainer.

    Args:
        world: this rank's seat; its mesh is what `config.parallel` asks for.
        config: the run's configuration.
        arch: the model's architecture.
        checkpoints: folder or URI of the run's checkpoints.
        tokenizer: directory whose tokenizer every saved model gets.

    Attributes:
        reference: the weights that KL is measured to, if the algorithm wants one: those the run began with; in host
            memory where engines are colocated. A model with adapters keeps none, its reference is the same model
            without them.
    """

    def __init__(
        self, world: World, config: RLConfig, arch: Any, checkpoints: str, tokenizer: str | None = None
    ) -> None:
        self.algorithm = make(config.algorithm)
        how = {"parallel": config.parallel, "dtype": DTYPES[config.precision]}
        model = begin(config.model, arch, world, seed=config.seed, **how)
        copied = self.algorithm.needs_reference and not model.adapted
        where = "cpu" if config.rollout.colocate else model.weights.device
        self.reference = model.weights.detach().to(where, copy=True) if copied else None
        self._publisher = Publisher(model)
        objective = PolicyObjective(self.algorithm, config.rollout.temperature)
        super().__init__(world, config, model, objective, checkpoints, tokenizer)

    def score(self, batch: Batch, reference: bool = False) -> Scores | None:
        """Log-probabilities of the batch's tokens by the current weights, or by the reference's, at the sampling
        temperature."""
        with self._as_reference() if reference else nullcontext():
            return self._score(batch, self._logprobs)

    def _logprobs(self, logits_TVt: torch.Tensor, batch: MicroBatch, start: int, tp: Axis) -> torch.Tensor:
        return token_logprobs(logits_TVt, batch, start, tp, self.config.rollout.temperature)

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """The model as the reference. Weights are swapped in: a second model would need a second of everything."""
        if self.model.adapted:
            with self.model.without_adapters():
                yield
            return
        if self.reference is None:
            yield
            return
        self.engine.settle()
        mine = self.model.weights.detach().clone()
        self.model.weights.copy_(self.reference)
        try:
            yield
        finally:
            self.model.weights.copy_(mine)

    def connect_publisher(
        self,
        directories: Mapping[str, str],
        nodes: Sequence[str],
        dtype: str,
        adapters: bool = False,
        consumers: Mapping[int, str] | None = None,
    ) -> Outgoing:
        """See `Publisher.connect`."""
        return self._publisher.connect(directories, nodes, dtype, adapters, consumers)

    def publish(self, turn: int, delta: bool = False) -> Published:
        """See `Publisher.publish`."""
        return self._publisher.publish(turn, delta)

    def outgoing(self, node: str, message: int, delta: bool = False) -> np.ndarray:
        """See `Publisher.outgoing`."""
        return self._publisher.outgoing(node, message, delta)

    def train(self, batch: Batch) -> dict[str, float] | None:
        """One RL step on a prepared batch: `config.updates` optimizer steps. Metrics from rank 0."""
        return self._train(self.algorithm.updates(batch))


class CriticTask(_Task):
    """One rank of the critic's trainer: the policy's layers at the start, with a score head that knows nothing yet.

    Arguments as `PolicyTask`'s.
    """

    def __init__(self, world: World, config: RLConfig, arch: Any, checkpoints: str) -> None:
        self.algorithm = make(config.algorithm)
        config = replace(config, optimizer=config.critic or config.optimizer)
        arch = arch.replace(num_labels=1)
        how = {"parallel": config.parallel, "dtype": DTYPES[config.precision]}
        model = begin(config.model, arch, world, seed=config.seed, leave=["score.weight"], **how)
        super().__init__(world, config, model, ValueObjective(self.algorithm), checkpoints, None)

    def score(self, batch: Batch) -> Scores | None:
        """The critic's estimates before each of the batch's tokens was chosen."""
        return self._score(batch, lambda scores_T1, *_: scores_T1[:, 0])

    def train(self, batch: Batch) -> dict[str, float] | None:
        """As many optimizer steps as the policy makes, on the same parts. Metrics from rank 0."""
        return self._train(self.algorithm.updates(batch))

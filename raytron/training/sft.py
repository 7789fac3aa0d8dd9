"""A fine-tuning run as one rank sees it: a pretraining run on other data. Only answers carry a loss (`data.sft`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytron.data.loader import GlobalBatches
from raytron.data.sft import build_sft_datasets
from raytron.training.task import PretrainTask

__all__ = ["SFTTask"]


class SFTTask(PretrainTask):
    """One rank of a fine-tuning run.

    Arguments and methods are `PretrainTask`'s, with an `SFTConfig` whose `steps` are known and `PreparedExamples`. A
    step's loss is the mean over the answer tokens of its global batch, however it is cut into ranks and micro-batches;
    held-out loss is that of the first `evaluation.batches` global batches of the held-out examples, all if there are
    no more.
    """

    def _make_data(self) -> None:
        config, size, length = self.config, self.config.global_batch_size, self.config.data.sequence_length
        samples = max(config.steps, 1) * size
        train, valid = build_sft_datasets(config.data, self.prepared, size, samples=samples)
        # A compiled layer would be compiled again for every width.
        trim = None if config.compile else 8 * config.parallel.tp
        micro = config.micro_batch_size
        self._train = GlobalBatches(train, size, micro, length, trim)
        self._valid = None if valid is None else GlobalBatches(valid, size, micro, length, trim)
        self._held_out_batches = 0 if valid is None else min(config.evaluation.batches, len(valid) // size)

    def _tokens(self) -> int:
        end = self.engine.counters.consumed_samples
        return int(self._train.dataset.lengths[end - self.config.global_batch_size : end].sum())

    def _adopted(self, told: Mapping[str, Any]) -> None:
        super()._adopted(told)
        for batches in filter(None, (self._train, self._valid)):
            if self.engine is not None and batches.trim is not None:
                batches.trim = 8 * self.engine.mesh.tp

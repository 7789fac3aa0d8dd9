"""Checkpoints of a run: when they are written, which are kept, and which one a run continues from.

An asynchronous save costs the step next to nothing:

    step k done -> save() ----------- forward, backward k+1 ----------- barrier | update k+1
                     \\_ saving thread: copy to host buffers _ done ______/      |  write, agree, commit ...

The copy overlaps the next forward and backward, which only read weights; the engine's barrier, right before its update
changes them, waits for what is left of it. Writing and agreeing then take their time beside the training, on process
groups of their own. A copy at `save()` itself would be simpler and block for all of it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Protocol

import torch

from raytron.checkpoint.adapters import FROZEN, describe_adapter, export_adapter, frozen_checksum
from raytron.checkpoint.huggingface import Tokenizer, export_model, to_json
from raytron.checkpoint.loading import load_checkpoint
from raytron.checkpoint.manifest import complete, step_name
from raytron.checkpoint.saving import Job, Plans, Saved, save_checkpoint
from raytron.checkpoint.state import shard_files
from raytron.checkpoint.storage import Storage
from raytron.models.base import ShardedModel
from raytron.parallel.collectives import Axis
from raytron.parallel.layout import Layout

__all__ = ["CheckpointManager"]

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What is saved and loaded: one rank of a training run.

    optimizer: name -> flat buffer laid out as `optimizer_layout` says; "master" is missing where weights are their own.
    saved_optimizer: the part of it that this rank saves, as `optimizer_layout(mirrors=False)` says.
    record: replicated numbers, JSON-ready; "step" is the committed step.
    """

    model: ShardedModel

    @property
    def optimizer(self) -> dict[str, torch.Tensor]: ...

    @property
    def saved_optimizer(self) -> dict[str, torch.Tensor]: ...

    @property
    def record(self) -> dict[str, int | float]: ...

    def optimizer_layout(self, *, version: int = 0, mirrors: bool = True) -> Layout: ...

    def add_barrier(self, barrier) -> None:
        """Call `barrier` right before weights or optimizer buffers change."""


class CheckpointManager:
    """Saves and loads the checkpoints of one run. Every rank has one; `save` and `load` are collective over its world.

    Args:
        location: folder of the checkpoints, on storage that all ranks share: a path or a URI pyarrow understands.
        keep: checkpoints to keep, the newest; None keeps all.
        asynchronous: write beside the training instead of within `save`.
        shard_mb: largest size of one model file in MB.

    Attributes:
        blocked_s: seconds that saves have kept the training waiting, in all.
        passed_over: what was wrong with each checkpoint that the last `load` found damaged, by name.
    """

    def __init__(
        self,
        location: str | os.PathLike[str] | Storage,
        *,
        keep: int | None = 2,
        asynchronous: bool = True,
        shard_mb: float = 5000,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"checkpoint_config.num_to_keep is {keep}; it must be at least 1, or None to keep all")
        self.storage = Storage.open(location)
        self.blocked_s = 0.0
        self.passed_over: dict[str, str] = {}
        self._keep, self._asynchronous, self._shard_mb = keep, asynchronous, shard_mb
        self._engine: Engine | None = None
        self._plans: Plans | None = None
        self._snapshot: _Snapshot | None = None
        self._bad: set[str] = set()
        self._last: Future[Saved] | None = None

    def list(self) -> list[str]:
        """Names of the checkpoints that exist, newest first (not verified)."""
        return complete(self.storage)

    def latest(self) -> str | None:
        """Where the newest checkpoint is; its `model` folder is a Hugging Face directory."""
        names = complete(self.storage)
        return f"{self.storage}/{names[0]}" if names else None

    # Saving

    def save(self, engine: Engine, tokenizer: Tokenizer = None) -> Future[Saved]:
        """Save the committed step. A failure is logged and in the result, never raised: training goes on.

        Waits for the save before, if it is still being written. The future is done at once unless `asynchronous`.

        tokenizer: a directory to copy its files from, or an object with `save(directory)`.
        """
        start = time.perf_counter()
        self.wait()
        self._meet(engine)
        live = {f"optimizer.{name}": tensor for name, tensor in engine.saved_optimizer.items()} | {
            "weights": engine.model.weights
        }
        record, axis = dict(engine.record), engine.model.world.extra("checkpoint")
        self._last = Future()
        if self._asynchronous:
            snapshot = self._prepared(live)
            snapshot.begin(live)
            work = (self._last, axis, record, live, snapshot, tokenizer)
            threading.Thread(target=self._save, args=work, name="checkpoint", daemon=True).start()
        else:
            self._save(self._last, axis, record, live, None, tokenizer)
        self.blocked_s += time.perf_counter() - start
        return self._last

    def wait(self) -> Saved | None:
        """How the last save ended, once it has; None when there was none."""
        return None if self._last is None else self._last.result()

    def forget(self) -> None:
        """Hold on to the last engine no longer, unless it is still being saved; then until the next save."""
        if self._last is None or self._last.done():
            self._engine, self._plans, self._snapshot = None, None, None

    def close(self) -> None:
        """Wait for what is still being written."""
        self.wait()

    def _meet(self, engine: Engine) -> None:
        if engine is not self._engine:
            self._engine, self._plans, self._snapshot = engine, None, None
            engine.add_barrier(lambda: self._barrier(engine))

    def _barrier(self, engine: Engine) -> None:
        if engine is self._engine and self._snapshot is not None:
            start = time.perf_counter()
            self._snapshot.barrier()
            self.blocked_s += time.perf_counter() - start

    def _prepared(self, live: Mapping[str, torch.Tensor]) -> _Snapshot:
        if self._snapshot is None:
            self._snapshot = _Snapshot(live)
        return self._snapshot

    def _save(
        self,
        future: Future[Saved],
        axis: Axis,
        record: dict[str, int | float],
        live: Mapping[str, torch.Tensor],
        snapshot: _Snapshot | None,
        tokenizer: Tokenizer,
    ) -> None:
        """Snapshot (if asynchronous), then save; the future gets how it ended."""
        try:
            held = live if snapshot is None else snapshot.finish(live)
            optimizer = {name.removeprefix("optimizer."): t for name, t in held.items() if name != "weights"}
            weights = held["weights"]
            if self._engine.model.adapted:  # a snapshot is ours to merge in
                weights = self._engine.model.merge_(weights.clone() if held is live else weights)
            job = Job(self._planned(axis), record, weights, optimizer, tokenizer)
            saved = save_checkpoint(self.storage, axis, job, self._keep, self._bad)
        except Exception as error:  # there is nobody above a saving thread, and a failed save must not stop training
            _log.debug("save failed", exc_info=True)
            saved = Saved(step_name(record["step"]), f"{type(error).__name__}: {error}")
        if saved.ok:
            self._bad.clear()
        elif axis.index == 0:
            _log.warning("checkpoint %s was not saved: %s; training goes on", saved.name, saved.error)
        future.set_result(saved)

    def _planned(self, axis: Axis) -> Plans:
        if self._plans is None:
            layout, model, adapter = self._engine.optimizer_layout(mirrors=False), self._engine.model, None
            if model.adapted:
                small = describe_adapter(model) | {FROZEN: to_json(frozen_checksum(model, axis))}
                adapter = (export_adapter(model), small)
            export = export_model(model, shard_mb=self._shard_mb)
            self._plans = Plans(model.arch, export, layout, shard_files(layout), adapter)
        return self._plans

    # Loading

    def load(self, engine: Engine, most: int | None = None) -> dict[str, int | float] | None:
        """Fill the engine's weights and optimizer buffers from the newest checkpoint that is whole, at any layout.

        most: of this step or an earlier one.

        Returns its record, which the caller gives the engine; None when there is no checkpoint. Damaged checkpoints are
        reported (logged) and passed over.

        Raises, on every rank:
            DamagedFile: there are checkpoints, and all are damaged; names the file.
            ValueError: the checkpoint is of another model or optimizer.
        """
        self.wait()
        loaded = load_checkpoint(self.storage, engine.model.world.extra("checkpoint"), engine, most)
        if loaded is None:
            return None
        self._bad, self.passed_over = set(loaded.bad), loaded.bad
        return loaded.record


class _Snapshot:
    """Host copies of an engine's buffers, taken while the next forward and backward run.

    On CPU the saving thread copies. On CUDA a stream beside the training's copies into pinned memory, and the barrier
    makes the training's stream wait for it, not the host.
    """

    def __init__(self, live: Mapping[str, torch.Tensor]) -> None:
        self._device = next(iter(live.values())).device
        cuda = self._device.type == "cuda"
        self._host = {n: torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=cuda) for n, t in live.items()}
        self._stream = torch.cuda.Stream(self._device) if cuda else None
        self._event: torch.cuda.Event | None = None
        self._copied = threading.Event()

    def begin(self, live: Mapping[str, torch.Tensor]) -> None:
        """In the training thread: from here to `barrier` the buffers stay as they are."""
        self._copied.clear()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                for name, tensor in live.items():
                    self._host[name].copy_(tensor, non_blocking=True)
            self._event = self._stream.record_event()

    def finish(self, live: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """In the saving thread: the copies, complete."""
        try:
            if self._event is not None:
                self._event.synchronize()
            else:
                for name, tensor in live.items():
                    self._host[name].copy_(tensor)
        finally:
            self._copied.set()
        return self._host

    def barrier(self) -> None:
        """In the training thread: after it the buffers may change."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        else:
            self._copied.wait()

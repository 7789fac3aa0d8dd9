"""One save, step by step.

    rank 0   clears what crashed saves left behind, makes the folder
    all      write their files of model/ and state/, hashing on the way
    all      tell each other what they wrote, or what failed first            <- everyone agrees from here on
    rank 0   manifest, rename, `latest`, prune

Until the rename (on remote storage: until the manifest) nothing that existed has been touched, so a crash at any point
leaves the old checkpoints or the new one. A rank that can't write goes on taking part in the exchange and says so at
the agreement; then everybody drops the save.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from raytron.checkpoint.digest import Entry
from raytron.checkpoint.huggingface import Tokenizer, try_describe, write_model
from raytron.checkpoint.manifest import MANIFEST, Manifest, complete, leftovers, step_name, temporary_name
from raytron.checkpoint.state import write_state
from raytron.checkpoint.storage import Storage
from raytron.checkpoint.writing import Export
from raytron.parallel.collectives import Axis
from raytron.parallel.layout import Layout, Place
from raytron.parallel.messages import gather, share

__all__ = ["LATEST", "Job", "Plans", "Saved", "save_checkpoint"]

LATEST = "latest"


@dataclass(frozen=True)
class Plans:
    """What saves of one engine have in common, computed once: pure functions of its layout.

    export: the model's files. layout: the optimizer's, of all ranks. files: each place's shard file. adapter: the file
    of the model's adapters and the small ones beside it, if it has any.
    """

    arch: Any
    export: Export
    layout: Layout
    files: Mapping[Place, str]
    adapter: tuple[Export, Mapping[str, bytes]] | None = None


@dataclass(frozen=True)
class Job:
    """What one rank saves, adapters merged into weights; the tensors stay as they are until the save is over."""

    plans: Plans
    record: Mapping[str, int | float]
    weights: torch.Tensor
    optimizer: Mapping[str, torch.Tensor]
    tokenizer: Tokenizer = None


@dataclass(frozen=True)
class Saved:
    """How a save ended: the checkpoint's name, and what went wrong (None: it exists). The same on every rank."""

    name: str
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None


def save_checkpoint(storage: Storage, axis: Axis, job: Job, keep: int | None, bad: Collection[str] = ()) -> Saved:
    """Write a checkpoint of `job.record["step"]`. Collective over `axis`, whose order is that of the ranks.

    keep: checkpoints to leave (None: all). bad: names known to be damaged, which count for nothing.
    """
    axis.barrier()  # nobody is still writing a save of before: the one clearing up may not be the one who did then
    name, first = step_name(job.record["step"]), axis.index == 0
    folder = temporary_name(name) if storage.renames else name
    small, error = try_describe(job.plans.arch, job.plans.export, job.tokenizer) if first else ({}, None)
    error = share(axis, error or (_attempt(_clear, storage, folder) if first else None))
    if error is not None:
        return Saved(name, error)
    everyone = gather(axis, _write(storage / folder, axis, job, small))
    error = next((error for _, error in everyone if error), None)
    if error is not None:
        left = _attempt(storage.delete, folder) if first else None  # give the space back
        return Saved(name, share(axis, error if left is None else f"{error}; {left}"))
    files = {path: Entry(*entry) for entries, _ in everyone for path, entry in entries.items()}
    manifest = Manifest(job.record, files)
    error = _attempt(_commit, storage, name, folder, manifest, keep, bad) if first else None
    return Saved(name, share(axis, error))


def _write(folder: Storage, axis: Axis, job: Job, small: Mapping[str, bytes]) -> tuple[dict[str, Entry], str | None]:
    """This rank's files: path -> entry, and the first error."""
    place = f"rank-{axis.index}"
    sources = {(place, "weights"): job.weights}
    rank, device = axis.index, job.weights.device
    parts = {"model": write_model(job.plans.export, sources, small, rank, axis, folder / "model", device)}
    if job.plans.adapter is not None:
        export, beside = job.plans.adapter
        beside = beside if rank == 0 else {}
        parts["adapter"] = write_model(export, sources, beside, rank, axis, folder / "adapter", device)
    parts["state"] = write_state(folder / "state", job.plans.layout, job.plans.files, place, job.optimizer)
    entries = {f"{part}/{path}": e for part, written in parts.items() for path, e in written.entries.items()}
    return entries, next((written.error for written in parts.values() if written.error), None)


def _attempt(action, *args) -> str | None:
    """What an action on the storage failed with."""
    try:
        action(*args)
    except OSError as error:
        return f"{error.filename or args[0]}: {error.strerror or error}"
    return None


def _clear(storage: Storage, folder: str) -> None:
    """Make room for a new folder."""
    for name in leftovers(storage):
        storage.delete(name)
    if not storage.renames:
        storage.delete(f"{folder}/{MANIFEST}")  # first: what lacks one is no checkpoint
        storage.delete(folder)


def _commit(
    storage: Storage, name: str, folder: str, manifest: Manifest, keep: int | None, bad: Collection[str]
) -> None:
    storage.write(f"{folder}/{MANIFEST}", manifest.encode())
    if storage.renames:
        old = f"{name}.old"
        if name in storage.folders():  # saved before, e.g. damaged: out of the way, but not gone until the new is there
            storage.delete(old)
            storage.rename(name, old)
        storage.rename(folder, name)
        storage.delete(old)
    storage.write(LATEST, f"{name}\n".encode())
    if keep is not None:
        _prune(storage, keep, set(bad) - {name})


def _prune(storage: Storage, keep: int, bad: Collection[str]) -> None:
    names = complete(storage)
    good = [name for name in names if name not in bad]
    for name in (*good[keep:], *(name for name in names if name in bad)):
        storage.delete(f"{name}/{MANIFEST}")  # first, so that a crash leaves no half of a checkpoint
        storage.delete(name)

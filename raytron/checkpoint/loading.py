"""One load: the newest checkpoint that is whole, on every rank the same.

Each rank plans its own copies from the files to its buffers and reads them; every file is hashed by at least one rank,
in the same pass where that rank needs all of it. A checkpoint with a missing, truncated or altered file is reported and
the one before it is tried. What does not fit the model is something else: falling back would hide it, so it is raised,
once it is sure that no damaged file is the cause.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytron.checkpoint.adapters import FROZEN, adapter_files, frozen_checksum
from raytron.checkpoint.digest import Entry
from raytron.checkpoint.manifest import Manifest, complete
from raytron.checkpoint.reading import Copy, by_path, copies, read, weight_files
from raytron.checkpoint.state import BUFFER, LAYOUT, State
from raytron.checkpoint.storage import DamagedFile, Storage
from raytron.models.adapters import CONFIG, to_peft
from raytron.models.base import ShardedModel
from raytron.parallel.collectives import Axis
from raytron.parallel.layout import only, plan
from raytron.parallel.messages import gather, share

__all__ = ["Loaded", "load_checkpoint"]

_log = logging.getLogger(__name__)
_INDEX = "model/model.safetensors.index.json"


@dataclass(frozen=True)
class Loaded:
    """The checkpoint whose bytes the engine has now, its record, and the damaged ones that were passed over."""

    name: str
    record: dict[str, int | float]
    bad: dict[str, str]


def load_checkpoint(storage: Storage, axis: Axis, engine: Any, most: int | None = None) -> Loaded | None:
    """Fill the engine's weights and optimizer buffers; None when there is no checkpoint. Collective over `axis`.

    most: pass over those of later steps.

    Raises, on every rank:
        DamagedFile: there are checkpoints, and all are damaged.
        ValueError: a checkpoint is of another model or optimizer, or of a newer format.
        OSError: the storage can't be listed.
    """
    names, error = share(axis, _listed(storage, most) if axis.index == 0 else None)
    if error is not None:
        raise OSError(error)
    bad: dict[str, str] = {}
    frozen = frozen_checksum(engine.model, axis) if names and engine.model.adapted else {}
    for name in names:
        manifest, problem = _manifest(storage, axis, name)
        problem = problem or _try(storage / name, axis, engine, manifest, frozen)
        if problem is None:
            return Loaded(name, dict(manifest.record), bad)
        bad[name] = problem
        if axis.index == 0:
            _log.warning("checkpoint %s is damaged (%s); falling back to the one before it", name, problem)
    if bad:
        raise DamagedFile(
            f"{storage}: every checkpoint is damaged, the newest by {next(iter(bad.values()))}; restore its files, or "
            "delete the checkpoints to start anew"
        )
    return None


def _listed(storage: Storage, most: int | None) -> tuple[list[str], str | None]:
    try:
        return complete(storage, most), None
    except OSError as error:
        return [], f"{storage}: {error.strerror or error}"


def _manifest(storage: Storage, axis: Axis, name: str) -> tuple[Manifest | None, str | None]:
    """The manifest and, if files are missing or have other sizes, what is wrong: as rank 0 sees it."""
    manifest, damage, refusal = None, None, None
    if axis.index == 0:
        try:
            manifest = Manifest.read(storage, name)
            damage = _sizes(storage / name, manifest)
        except (DamagedFile, OSError) as error:
            damage = str(error)
        except ValueError as error:
            refusal = str(error)
    record, files, damage, refusal = share(
        axis, [manifest and manifest.record, manifest and manifest.files, damage, refusal]
    )
    if refusal is not None:
        raise ValueError(refusal)
    if record is None:
        return None, damage
    return Manifest(record, {path: Entry(*entry) for path, entry in files.items()}), damage


def _sizes(checkpoint: Storage, manifest: Manifest) -> str | None:
    found = checkpoint.files()
    for path, entry in manifest.files.items():
        if found.get(path) != entry.nbytes:
            what = f"truncated to {found[path]}" if path in found else "missing,"
            return f"{checkpoint}/{path}: {what} of {entry.nbytes} bytes"
    return None


def _try(checkpoint: Storage, axis: Axis, engine: Any, manifest: Manifest, frozen: Mapping[str, str]) -> str | None:
    """Read one checkpoint; what is damaged in it, on every rank the same."""
    wanted: Mapping[str, Sequence[Copy]] = {}
    damage, misfit = None, None
    try:
        wanted = _wanted(checkpoint, engine, manifest, frozen)
    except (DamagedFile, OSError) as error:
        damage = str(error)
    except ValueError as error:
        misfit = str(error)
    everyone = gather(axis, [damage, misfit, _whole(wanted, manifest)])
    if (damage := _first(row[0] for row in everyone)) is not None:
        return damage
    misfit = _first(row[1] for row in everyone)
    duties = _duties(manifest.files, [row[2] for row in everyone])[axis.index]
    try:
        read(checkpoint, {} if misfit else wanted, {path: manifest.files[path] for path in duties})
    except (DamagedFile, OSError) as error:
        damage = str(error)
    damage = _first(gather(axis, damage))
    if damage is None and misfit is not None:
        raise ValueError(misfit)
    return damage


def _first(values) -> str | None:
    return next((value for value in values if value is not None), None)


def _whole(wanted: Mapping[str, Sequence[Copy]], manifest: Manifest) -> list[str]:
    """Files of which this rank reads nearly every byte anyway."""
    nbytes = {path: sum(copy.nbytes for copy in found) for path, found in wanted.items()}
    return [path for path, n in nbytes.items() if n >= 0.9 * manifest.files[path].nbytes]


def _duties(files: Mapping[str, Entry], whole: Sequence[Sequence[str]]) -> list[list[str]]:
    """The files each rank verifies: those it reads whole, the rest spread by bytes."""
    duties = [list(paths) for paths in whole]
    load = [sum(files[path].nbytes for path in paths) for paths in whole]
    taken = {path for paths in whole for path in paths}
    for path in sorted(files.keys() - taken, key=lambda path: (-files[path].nbytes, path)):
        rank = load.index(min(load))
        duties[rank].append(path)
        load[rank] += files[path].nbytes
    return duties


def _wanted(checkpoint: Storage, engine: Any, manifest: Manifest, frozen: Mapping[str, str]) -> dict[str, list[Copy]]:
    """The copies, by file of the checkpoint, that fill this rank's buffers."""
    verified = (f"state/{LAYOUT}", _INDEX, f"adapter/{CONFIG}", f"adapter/{FROZEN}")
    read(checkpoint, {}, {path: manifest.files[path] for path in verified if path in manifest.files})
    step, place, model = manifest.record["step"], f"rank-{engine.model.world.rank}", engine.model
    _same_kind(checkpoint, model, manifest, frozen)
    state = State(checkpoint / "state", step) if f"state/{LAYOUT}" in manifest.files else None
    stored = state.buffers if state is not None else ()
    target = only(model.trained_layout(version=step), places=[place])
    shard = engine.optimizer_layout(version=step)
    live = engine.optimizer
    from_state = {name: tensor for name, tensor in live.items() if name in stored or name != "master"}
    found: list[tuple[str, Copy]] = []
    if from_state:
        if state is None:
            raise ValueError(f"{checkpoint} has no optimizer state; load its weights with from_pretrained instead")
        found += [(f"state/{path}", copy) for path, copy in state.copies(shard, place, from_state)]
    buffers = {(place, "weights"): model.weights}
    if "master" in stored and "master" not in live:  # weights that are their own masters take the wider values
        regions = state.regions("master")
        found += [(f"state/{p}", copy) for p, copy in copies(plan(state.layout, target), regions, buffers)]
        return by_path(found)
    folder = "adapter" if model.adapted else "model"  # what is frozen is there already, and was merged in "model"
    files = (adapter_files if model.adapted else weight_files)(checkpoint / folder, step)
    found += [(f"{folder}/{path}", copy) for path, copy in copies(plan(files.layout, target), files.regions, buffers)]
    if "master" in live and "master" not in from_state:
        moves = plan(files.layout, only(shard, places=[place]))
        masters = {(place, BUFFER): live["master"]}
        found += [(f"{folder}/{path}", copy) for path, copy in copies(moves, files.regions, masters)]
    return by_path(found)


def _same_kind(checkpoint: Storage, model: ShardedModel, manifest: Manifest, frozen: Mapping[str, str]) -> None:
    """ValueError where one of the two has adapters and the other has not, or not the same, or beside another model."""
    told, file = to_peft(model.arch) if model.adapted else None, f"adapter/{CONFIG}"
    saved = json.loads(checkpoint.read(file)) if file in manifest.files else None
    if (saved and {**saved, "base_model_name_or_path": None}) != told:
        raise ValueError(
            f"{checkpoint} has {_adapters(saved)} and this run {_adapters(told)}; choose another run.name, and begin "
            f"from the checkpoint with model.path {checkpoint}/model"
        )
    beside = json.loads(checkpoint.read(f"adapter/{FROZEN}")) if saved else {}
    if any(beside.get(dtype, checksum) != checksum for dtype, checksum in frozen.items()):
        raise ValueError(
            f"the model that the adapters of {checkpoint} are beside is not the one that this run begins with (their "
            "checksums differ); give it the model.path, or the preset and seed, that it was started with"
        )


def _adapters(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return "no adapters"
    names = ("r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save")
    return "adapters (" + ", ".join(f"{name} {config[name]}" for name in names) + ")"

"""Weights as a Hugging Face directory: the only form in which raytron keeps them.

Saving is a plan like everything that moves weights: from where the ranks hold the tensors to the files, each of which
one rank writes from front to back. Tensors travel in small buckets, so the extra memory is about twice the largest one
at any size of model; names and shapes are Hugging Face's (padding is in no piece, so it never leaves its rank). A
directory appears by renaming; where the path already holds something, files are replaced one at a time, the weights
before the index and the configuration last, and nothing that isn't ours is touched.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from raytron.checkpoint.reading import by_path, copies, read, weight_files
from raytron.checkpoint.storage import LocalStorage, Storage
from raytron.checkpoint.writing import Export, Written, export, write_export, write_files
from raytron.models.base import ShardedModel
from raytron.models.layers.lora import is_adapter
from raytron.models.registry import family_of
from raytron.parallel.collectives import Axis
from raytron.parallel.layout import Layout, Place, Plan, only
from raytron.parallel.messages import gather, share
from raytron.parallel.storage import Buffers
from raytron.parallel.transport import Distributed

__all__ = [
    "convert",
    "export_model",
    "merged_layout",
    "save_files",
    "save_pretrained",
    "small_files",
    "to_json",
    "try_describe",
    "write_model",
]

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_TOKENIZER = re.compile(
    r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.model|chat_template.*)"
)
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Saves(Protocol):
    """A tokenizer that writes its files into a directory."""

    def save(self, directory: str) -> object: ...


Tokenizer = str | os.PathLike[str] | Saves | None


def save_pretrained(
    model: ShardedModel,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer = None,
    dtype: torch.dtype | None = None,
    shard_mb: float = 5000,
) -> None:
    """Write a Hugging Face directory: safetensors with their index, configuration, generation configuration, tokenizer.

    Collective over the model's world. `transformers.AutoModelForCausalLM.from_pretrained` and `raytron.models.
    from_pretrained` load it, at any layout. Adapters are merged into the weights (`save_adapter` saves them alone).

    Args:
        model: this rank's part.
        path: directory on a file system that all ranks share, or a URI pyarrow understands.
        tokenizer: a directory to copy its files from, or an object with `save(directory)`.
        dtype: of the stored floating tensors; by default as in memory.
        shard_mb: largest size of one file in MB (10^6 bytes); a larger tensor has a file of its own.

    Raises:
        OSError: on every rank, naming the file one of them could not write.
    """
    job = export_model(model, dtype=dtype, shard_mb=shard_mb)
    small, problem = try_describe(model.arch, job, tokenizer) if model.world.rank == 0 else ({}, None)
    if (problem := share(model.world.axis("world"), problem)) is not None:
        raise ValueError(problem)
    save_files(model, path, job, model.merged(), small)


def save_files(
    model: ShardedModel, path: str | os.PathLike[str], job: Export, weights: torch.Tensor, small: Mapping[str, bytes]
) -> None:
    """Write a directory as a whole: the files of `job` from the ranks' `weights`, and rank 0's small ones. Collective.

    Raises OSError on every rank, naming the file one of them could not write.
    """
    axis, rank = model.world.axis("world"), model.world.rank
    storage, name = _parent(path)
    temporary = f".{name}.tmp" if storage.renames else name
    _agree(axis, storage, _attempt(storage.delete, temporary) if rank == 0 and storage.renames else None)
    sources = {(f"rank-{rank}", "weights"): weights}
    written = write_model(job, sources, small, rank, axis, storage / temporary, weights.device)
    everyone = gather(axis, [written.error, sorted(written.entries)])
    error = next((error for error, _ in everyone if error), None)
    if error and rank == 0 and storage.renames:
        storage.delete(temporary)
    _agree(axis, storage, error)
    new = {path for _, paths in everyone for path in paths}
    _agree(axis, storage, _attempt(_publish, storage, temporary, name, new) if rank == 0 else None)


def _parent(path: str | os.PathLike[str]) -> tuple[Storage, str]:
    storage = Storage.open(path)
    if isinstance(storage, LocalStorage):
        return LocalStorage(storage.root.parent), storage.root.name
    return storage, ""


def _attempt(action, *args) -> str | None:
    """What an action on the storage failed with."""
    try:
        action(*args)
    except OSError as error:
        return f"{error.filename or args[0]}: {error.strerror or error}"
    return None


def _agree(axis: Axis, storage: Storage, error: str | None) -> None:
    errors = [error for error in gather(axis, error) if error]
    if errors:
        raise OSError(f"the model can't be saved under {storage}: {errors[0]}")


def _publish(storage: Storage, temporary: str, name: str, new: Collection[str]) -> None:
    """Give the `new` files of `temporary` their place in `name`, and remove weights there that are not of them."""
    old = (storage / name).files()
    if storage.renames and not old:
        storage.delete(name)  # it may exist, empty
        storage.rename(temporary, name)
        return
    if storage.renames:
        for path in sorted(new, key=_last):
            storage.rename(f"{temporary}/{path}", f"{name}/{path}")
        storage.delete(temporary)
    for path in old:
        if _OURS.fullmatch(path) and path not in new:
            (storage / name).delete(path)


def _last(path: str) -> tuple[bool, bool, str]:
    """Sorts an index after the weights and the configuration after everything."""
    return path == CONFIG, path == INDEX, path


# The steps, which checkpoints share


def merged_layout(model: ShardedModel, version: int = 0) -> Layout:
    """Where all ranks hold the tensors of the model without its adapters: of `merged`, or of `weights`."""
    layout = model.layout(version=version)
    return only(layout, [name for name in layout.tensors if not is_adapter(name)]) if model.adapted else layout


def export_model(model: ShardedModel, *, dtype: torch.dtype | None = None, shard_mb: float = 5000) -> Export:
    """The plan from the model's ranks to its files, adapters merged; pure, and the same on every rank."""
    if shard_mb <= 0:
        raise ValueError(f"shard_mb is {shard_mb}; a file needs a size above 0")
    ranks = {f"rank-{rank}": rank for rank in range(model.world.mesh.size)}
    return export(merged_layout(model), ranks, dtype=dtype, max_bytes=int(shard_mb * 1e6))


def write_model(
    job: Export,
    sources: Buffers,
    small: Mapping[str, bytes],
    rank: int,
    axis: Axis,
    storage: Storage,
    device: torch.device | str = "cpu",
) -> Written:
    """Write this rank's files of the directory `storage`: collective over `axis`, on which every rank takes part even
    when its own writing fails. `small`: the other files, which one rank gives."""
    index: dict[Place, int] = {f"rank-{r}": r for r in range(axis.size)} | dict(job.writers)

    def fill(bucket: Plan, targets: Buffers) -> None:
        Distributed(axis, index, sources, targets).move(bucket)

    written = write_export(job, rank, fill, storage, device)
    if written.error is None:
        rest = write_files(storage, dict(sorted(small.items(), key=lambda item: _last(item[0]))))
        written.entries |= rest.entries
        written.error = rest.error
    return written


def describe(arch: Any, job: Export, tokenizer: Tokenizer = None) -> dict[str, bytes]:
    """The small files of a directory: configuration, generation configuration, index, tokenizer."""
    config = family_of(arch).to_hf(arch)
    if job.target.tensors:
        config = config | {"dtype": next(iter(job.target.tensors.values())).dtype}
    generation = {"_from_model_config": True} | {k: config[k] for k in _SPECIAL_IDS if config.get(k) is not None}
    files = {CONFIG: config, "generation_config.json": generation, **_index(job)}
    return {name: to_json(value) for name, value in files.items()} | tokenizer_files(tokenizer)


def try_describe(arch: Any, job: Export, tokenizer: Tokenizer) -> tuple[dict[str, bytes], str | None]:
    """`describe`, or what its tokenizer raised: other ranks wait for this one, so it must not leave."""
    try:
        return describe(arch, job, tokenizer), None
    except Exception as error:
        return {}, f"tokenizer: {error}"


def _index(job: Export) -> dict[str, Any]:
    if len(job.writers) == 1:  # one file needs none, and transformers writes none
        return {}
    weight_map = {name: place.removeprefix("file:") for place, names in job.files.items() for name in names}
    total = sum(spec.nbytes for spec in job.target.tensors.values())
    return {INDEX: {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}}


def to_json(value: Any) -> bytes:
    """A small file of a directory."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a tokenizer: copied from a directory, or as its own `save(directory)` writes them."""
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, str | os.PathLike):
        folder = Path(tokenizer)
        found = {p.name: p.read_bytes() for p in sorted(folder.glob("*")) if _TOKENIZER.fullmatch(p.name)}
        if not found:
            raise ValueError(f"{folder} holds no tokenizer files (tokenizer.json or the like); give a Hugging Face one")
        return found
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


# raytron convert


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    shard_mb: float = 5000,
) -> None:
    """Copy a Hugging Face directory with another dtype or other file sizes; everything else is kept as it is.

    Streams: memory is about twice the largest tensor. The target appears when it is whole.

    Raises:
        ValueError: `source` holds no safetensors weights, or is damaged; or is the target too.
        OSError: a file can't be written.
    """
    origin, (storage, name) = Storage.open(source), _parent(target)
    if str(origin) == str(storage / name):
        raise ValueError(f"{source}: can't be converted into itself; give another target")
    files = weight_files(origin)
    job = export(files.layout, dict.fromkeys(files.layout.places, 0), dtype=dtype, max_bytes=int(shard_mb * 1e6))
    temporary = f".{name}.tmp" if storage.renames else name
    storage.delete(temporary) if storage.renames else None

    def fill(bucket: Plan, targets: Buffers) -> None:
        read(origin, by_path(copies(bucket, files.regions, targets)), {})

    written = write_export(job, 0, fill, storage / temporary)
    new = set(written.entries)
    if written.error is None:
        small = small_files(origin, dtype) | {path: to_json(value) for path, value in _index(job).items()}
        written = write_files(storage / temporary, dict(sorted(small.items(), key=lambda item: _last(item[0]))))
    if written.error is not None:
        if storage.renames:
            storage.delete(temporary)
        raise OSError(f"{target} can't be written: {written.error}")
    _publish(storage, temporary, name, new | set(written.entries))


def small_files(origin: Storage, dtype: torch.dtype | None) -> dict[str, bytes]:
    """The small files of a directory, its configuration with the new dtype."""
    names = [path for path in origin.files() if "/" not in path and not path.startswith(".")]
    small = {path: origin.read(path) for path in names if not path.endswith((".safetensors", INDEX, ".bin", ".pth"))}
    if dtype is not None and CONFIG in small:
        config = json.loads(small[CONFIG])
        config.pop("torch_dtype", None)
        small[CONFIG] = to_json(config | {"dtype": str(dtype).removeprefix("torch.")})
    return small

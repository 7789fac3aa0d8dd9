"""Adapters as PEFT keeps them: what a model with adapters saves beside its merged weights, and nothing else has.

One file, as PEFT reads one: adapters are small. Who resumes a run, or begins another, reads it back bit for bit; the
merged model could not be taken apart again.
"""

from __future__ import annotations

import os

from raytron.checkpoint.huggingface import save_files, to_json
from raytron.checkpoint.reading import Files, tensor_files
from raytron.checkpoint.storage import Storage
from raytron.checkpoint.writing import Export, export
from raytron.models.adapters import CONFIG, FILE, canonical_name, peft_name, to_peft
from raytron.models.base import ShardedModel
from raytron.parallel.checksum import checksums, combine, fold
from raytron.parallel.collectives import Axis
from raytron.parallel.layout import only, owners, rename
from raytron.parallel.messages import gather

__all__ = ["FROZEN", "adapter_files", "describe_adapter", "export_adapter", "frozen_checksum", "save_adapter"]

FROZEN = "frozen.json"


def save_adapter(model: ShardedModel, path: str | os.PathLike[str]) -> None:
    """Write the model's adapters as a directory that `peft.PeftModel.from_pretrained` and `model.lora.path` take.

    Collective over the model's world. `save_pretrained` writes the model with its adapters merged into it.

    Args:
        model: this rank's part, with adapters.
        path: directory on a file system that all ranks share, or a URI pyarrow understands.

    Raises:
        ValueError: the model has none.
        OSError: on every rank, naming the file one of them could not write.
    """
    if not model.adapted:
        raise ValueError("this model has no adapters to save; build it with lora.rank above 0, or save_pretrained it")
    small = describe_adapter(model) if model.world.rank == 0 else {}
    save_files(model, path, export_adapter(model), model.weights, small)


def export_adapter(model: ShardedModel) -> Export:
    """The plan from the model's ranks to the adapter's file; pure, and the same on every rank."""
    ranks = {f"rank-{rank}": rank for rank in range(model.world.mesh.size)}
    layout = rename(model.trained_layout(), peft_name)
    return export(layout, ranks, dtype=None, max_bytes=1 << 62, stem=FILE.removesuffix(".safetensors"))


def describe_adapter(model: ShardedModel) -> dict[str, bytes]:
    """The small files of the directory; PEFT finds there where the model is that the adapters are beside."""
    return {CONFIG: to_json(to_peft(model.arch, model.origin))}


def frozen_checksum(model: ShardedModel, axis: Axis) -> dict[str, str]:
    """What tells one frozen model from another, the same at any layout: for a checkpoint, which does not contain it.

    Collective over `axis`, the world's ranks in order. Sums of different dtypes cannot be compared.
    """
    layout, me = model.layout(), f"rank-{axis.index}"
    frozen = only(layout, layout.tensors.keys() - model.trained_layout().tensors.keys())
    mine = checksums(only(owners(frozen), places=[me]), {(me, "weights"): model.weights.detach()})
    return {model.dtype_name: f"{fold(combine(gather(axis, mine))):016x}"}


def adapter_files(storage: Storage, version: int) -> Files:
    """The tensors of an adapter's directory, by their canonical names."""
    layout, regions = tensor_files(storage, [FILE], version)
    return Files(rename(layout, canonical_name), regions)

"""Models from presets and from Hugging Face directories, at any layout, streamed by slice."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from raytron.config import ModelConfig, ParallelConfig
from raytron.models.adapters import load_adapter
from raytron.models.base import ShardedModel
from raytron.models.layers.lora import is_adapter
from raytron.models.registry import FAMILIES, PRESETS, family_of
from raytron.parallel.collectives import World
from raytron.parallel.layout import only, plan
from raytron.parallel.transport import FileReader, file_layout, run

__all__ = ["begin", "build", "from_pretrained", "load_weights", "read_arch"]


def build(
    arch: Any,
    mesh: World | None = None,
    *,
    parallel: ParallelConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    seed: int | None = None,
) -> ShardedModel:
    """This rank's part of a model.

    Args:
        arch: an architecture (`DecoderConfig`, ...) or the name of a preset.
        mesh: this rank's seat in a mesh; None builds the whole model in one process.
        parallel: how layers are cut (virtual stages, uneven stages, sequence parallelism).
        dtype: of the weights.
        device: default the seat's; "meta" takes no memory.
        seed: initialise, the same weights at any layout; None leaves zeros.

    Raises:
        ValueError: unknown preset, or sizes the mesh does not divide.
    """
    if isinstance(arch, str):
        if arch not in PRESETS:
            raise ValueError(f"preset {arch!r} is unknown; there are {', '.join(PRESETS)}")
        arch = PRESETS[arch]
    model = family_of(arch).model(arch, mesh, parallel=parallel, dtype=dtype, device=device)
    return model if seed is None else model.initialize(seed)


def begin(
    config: ModelConfig,
    arch: Any,
    mesh: World | None = None,
    *,
    parallel: ParallelConfig | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    leave: Collection[str] = (),
) -> ShardedModel:
    """This rank's part of the model that a run begins with.

    Weights are those of `config.path`, or drawn by `seed`; adapters those of `config.lora.path`, or such that they
    change nothing yet.

    Args:
        arch: `resolve(config)`, or made from it.
        leave: tensors that directories need not have (a new score head).
        mesh, parallel, dtype: see `build`.
    """
    model = build(arch, mesh, parallel=parallel, dtype=dtype).initialize(seed, added=config.path is not None)
    if config.path is not None:
        load_weights(model, config.path, leave)
    if config.lora.path is not None:
        load_adapter(model, config.lora.path, leave)
    return model


def read_arch(path: str | Path) -> Any:
    """The architecture in a Hugging Face directory's `config.json`.

    Raises:
        ValueError: no such file, no JSON object, a model type no family reads, or fields it cannot use.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file}: not found; give a Hugging Face model directory, which has a config.json")
    try:
        config: Mapping[str, Any] = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); download or save the model again") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FAMILIES:
        raise ValueError(f"{file}: model_type {kind!r} is not supported; families are {', '.join(FAMILIES)}")
    try:
        return FAMILIES[kind].from_hf(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def from_pretrained(
    path: str | Path,
    mesh: World | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    parallel: ParallelConfig | None = None,
    device: str | torch.device | None = None,
) -> ShardedModel:
    """This rank's part of the model in a Hugging Face directory; without `mesh` the whole model.

    Reads only the byte ranges this rank holds; beyond the model itself at most two tensors are in memory.
    Calling a model that is not cut over pp on tokens_BT (int64) gives logits_BTV.

    Raises:
        ValueError: missing, truncated or malformed files, tensors missing or of another shape; names file and tensor.
    """
    model = build(read_arch(path), mesh, parallel=parallel, dtype=dtype, device=device)
    load_weights(model, path)
    return model


def load_weights(model: ShardedModel, path: str | Path, leave: Collection[str] = ()) -> None:
    """Fill `model`'s weights from the safetensors files of a Hugging Face directory, casting to its dtype.

    Tensors the model has no place for (rotary buffers, the stored twin of a tied head) are passed over, and adapters
    that the files do not have stay as they are.

    leave: tensors of the model that stay as they are where the files do not have them (a new score head).
    """
    files = file_layout(path)
    me, layout = f"rank-{model.world.rank}", model.layout()
    wanted = [name for name in layout.tensors if name in files.tensors or not (name in leave or is_adapter(name))]
    try:
        moves = plan(files, only(layout, wanted, places=[me]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with FileReader(path, {(me, "weights"): model.weights}) as reader:
        run(moves, reader)
    model.origin = str(path)

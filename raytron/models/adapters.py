"""Adapters in PEFT's format: a directory with adapter_config.json and adapter_model.safetensors.

PEFT names a tensor by its module in PEFT's wrapper around `transformers`' model; without that prefix it is the name
that our layers declare. So an adapter is read and written like any other tensor, at any layout.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from raytron.config import LINEAR, LoRAConfig
from raytron.models.base import ShardedModel
from raytron.parallel.layout import only, plan, rename
from raytron.parallel.transport import FileReader, file_layout, run

__all__ = ["CONFIG", "FILE", "from_peft", "load_adapter", "peft_name", "resolve_lora", "to_peft"]

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What of PEFT's LoraConfig would be another computation, with the values that are not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "exclude_modules": (None, []),
    "target_parameters": (None, []),
    "modules_to_save": (None, [], ["score"]),
    "trainable_token_indices": (None,),
}


def peft_name(name: str) -> str:
    """PEFT's name of a canonical tensor."""
    return _PREFIX + name


def canonical_name(name: str) -> str:
    """The canonical name of PEFT's."""
    return name.removeprefix(_PREFIX)


def to_peft(arch: Any, base: str | None = None) -> dict[str, Any]:
    """What adapter_config.json says of an architecture's adapters; `base`: the model they are beside."""
    lora: LoRAConfig = arch.lora
    return {
        "peft_type": "LORA",
        "task_type": "TOKEN_CLS" if arch.num_labels else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "use_rslora": lora.rslora,
        "modules_to_save": ["score"] if arch.num_labels else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def from_peft(config: Mapping[str, Any]) -> LoRAConfig:
    """The adapters that an adapter_config.json describes. ValueError for what our adapters do not compute."""
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"peft_type {kind!r} is not supported; LORA is")
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise ValueError(f"{name} {config[name]!r} is not supported; merge the adapter with PEFT instead")
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        raise ValueError(f"target_modules {targets!r} is not supported; a list of {', '.join(LINEAR)} is")
    named = {str(target).rpartition(".")[2] for target in targets}  # some list the module of every layer
    if unknown := sorted(named - {*LINEAR}):
        raise ValueError(f"target_modules {unknown} are not supported; {', '.join(LINEAR)} are")
    rank, alpha, rslora = config.get("r"), config.get("lora_alpha", 8), bool(config.get("use_rslora"))
    targets = tuple(name for name in LINEAR if name in named)
    return LoRAConfig(rank=rank, alpha=alpha, target_modules=targets, rslora=rslora)


def resolve_lora(lora: LoRAConfig) -> LoRAConfig:
    """What to build: as given, or as the directory at `lora.path` says.

    Raises ValueError for a directory without a usable adapter_config.json, or that is not what is asked for besides.
    """
    if lora.path is None:
        return lora
    file = Path(lora.path) / CONFIG
    if not file.is_file():
        raise ValueError(f"{file}: not found; give a directory in PEFT's format, such as a checkpoint's adapter folder")
    try:
        found = from_peft(json.loads(file.read_text()))
    except ValueError as error:  # json's too
        raise ValueError(f"{file}: {error}") from None
    asked = replace(lora, path=None)
    if asked != LoRAConfig() and (asked.targets, replace(asked, target_modules=found.target_modules)) != (
        found.targets,
        found,
    ):
        raise ValueError(
            f"{lora.path} has {_told(found)}, and asked for is {_told(asked)}; leave out all but lora.path"
        )
    return found


def _told(lora: LoRAConfig) -> str:
    fields = {name: value for name, value in asdict(lora).items() if name != "path"}
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def load_adapter(model: ShardedModel, path: str | Path, leave: Collection[str] = ()) -> None:
    """Fill `model`'s adapters from a directory in PEFT's format, at any layout, casting to its dtype.

    leave: tensors that stay as they are where the directory does not have them (a new score head).

    Raises ValueError for missing or damaged files, and for adapters of other layers or sizes; names the tensor.
    """
    if not (Path(path) / FILE).is_file():
        raise ValueError(f"{path}: holds no {FILE}; PEFT's save_pretrained writes one (its older .bin is not read)")
    files, me = rename(file_layout(Path(path) / FILE), canonical_name), f"rank-{model.world.rank}"
    layout = model.trained_layout()
    if unknown := sorted(files.tensors.keys() - layout.tensors.keys()):
        raise ValueError(f"{path}: {unknown[0]} is not one of the model's adapters, of {_told(model.arch.lora)}")
    wanted = [name for name in layout.tensors if name in files.tensors or name not in leave]
    try:
        moves = plan(files, only(layout, wanted, places=[me]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with FileReader(Path(path) / FILE, {(me, "weights"): model.weights}) as reader:
        run(moves, reader)

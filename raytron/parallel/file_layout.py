"""Safetensors headers, and layouts of files: what is in a directory, and how a model is split into shards.

The format is simple enough (a length, a JSON header, the data) to be parsed and validated here without touching data;
the safetensors package offers slices, but neither reading into given memory nor writing piece by piece.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raytron.parallel.pieces import Layout, Piece, Place, Spec

PREFIX = "file:"
_MAX_HEADER = 100_000_000  # the format's own limit
_CODES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_NAMES = {name: code for code, name in _CODES.items()}


# Headers


@dataclass(frozen=True)
class Header:
    """One file's tensors: canonical Specs, and the byte at which each tensor's data starts in the file."""

    specs: Mapping[str, Spec]
    starts: Mapping[str, int]
    metadata: Mapping[str, str]
    size: int


def read_header(path: str | Path) -> Header:
    """Parse and validate a safetensors header.

    Raises `ValueError` naming the file (and tensor) when the file is truncated, is no safetensors file, or its header
    contradicts itself; data are not read.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; fetch the checkpoint again or correct its index") from None
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(
                f"{path} ({size} bytes) is truncated or not a safetensors file: its header should have {length} bytes; "
                "fetch it again"
            )
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", {})
        found = {name: _entry(path, name, entry) for name, entry in entries.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has a damaged safetensors header ({error!r}); fetch it again") from None
    end = 0
    for name, (_, begin, stop) in sorted(found.items(), key=lambda item: item[1][1:]):
        if begin != end:
            raise ValueError(f"{path}: the data of {name} start at byte {begin}, not at {end}; the file is damaged")
        end = stop
    if 8 + length + end != size:
        raise ValueError(
            f"{path} has {size} bytes and its header describes {8 + length + end}; it is truncated or damaged: fetch "
            "or save it again"
        )
    starts = {name: 8 + length + begin for name, (_, begin, _) in found.items()}
    return Header({name: spec for name, (spec, _, _) in found.items()}, starts, metadata, size)


def _entry(path: Path, name: str, entry: Mapping) -> tuple[Spec, int, int]:
    shape, (begin, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] not in _CODES:
        raise ValueError(f"{path}: {name} has dtype {entry['dtype']!r}, which is not one of {', '.join(_CODES)}")
    spec = Spec(shape, _CODES[entry["dtype"]])
    if any(not isinstance(n, int) or n < 0 for n in (*shape, begin, stop)) or stop - begin != spec.nbytes:
        raise ValueError(
            f"{path}: {name} of shape {shape} and dtype {spec.dtype} cannot have data at [{begin}, {stop}); the header "
            "is damaged"
        )
    return spec, begin, stop


def file_order(specs: Mapping[str, Spec]) -> list[str]:
    """Wide dtypes first, so that every tensor is aligned to its own element (the header ends on a cache line)."""
    return sorted(specs, key=lambda name: -specs[name].itemsize)


def header_bytes(specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length and JSON header of a file with these tensors, in `file_order`."""
    entries: dict = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in file_order(specs):
        spec = specs[name]
        if spec.dtype not in _NAMES:
            raise ValueError(f"{name}: safetensors has no dtype for {spec.dtype}; store it as uint8")
        entries[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % 64)
    return struct.pack("<Q", len(raw)) + raw


# Layouts of files


def _whole(name: str, spec: Spec, place: Place) -> Piece:
    strides = tuple(math.prod(spec.shape[d + 1 :]) for d in range(len(spec.shape)))
    return Piece(spec.box, name, 0, strides, (place,))


def _layout(files: Mapping[str, Mapping[str, Spec]], version: int) -> Layout:
    tensors, pieces, sizes = {}, {}, {}
    for file, specs in files.items():
        place = PREFIX + file
        for name, spec in specs.items():
            if name in tensors:
                raise ValueError(f"{name} is in {file} and in another file; keep one of them")
            tensors[name], sizes[place, name] = spec, spec.numel
            if spec.numel:
                pieces[name] = (_whole(name, spec, place),)
    return Layout(version, tensors, pieces, sizes)


def _files_of(root: Path, stem: str) -> tuple[list[str], dict[str, str]]:
    """File names, and what an index says of each tensor (as Hugging Face: one plain file before an index)."""
    index = root / f"{stem}.safetensors.index.json"
    if (root / f"{stem}.safetensors").exists():
        return [f"{stem}.safetensors"], {}
    if index.exists():
        try:
            weight_map = dict(json.loads(index.read_bytes())["weight_map"])
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{index} is damaged ({error!r}); fetch it again") from None
        return sorted(set(weight_map.values())), weight_map
    names = sorted(path.name for path in root.glob("*.safetensors"))
    if not names:
        raise ValueError(f"{root} holds no safetensors file; give the directory of a Hugging Face checkpoint")
    return names, {}


def file_layout(root: str | Path, version: int = 0, stem: str = "model") -> Layout:
    """The layout of a directory of safetensors files (`model.safetensors`, else the index's, else all), or of one file.

    Places are `file:NAME`. Only headers are read. Raises `ValueError` naming the file that is missing or damaged.
    """
    root = Path(root)
    names, weight_map = ([root.name], {}) if root.is_file() else _files_of(root, stem)
    folder = root.parent if root.is_file() else root
    files = {name: read_header(folder / name).specs for name in names}
    for tensor, name in weight_map.items():
        if tensor not in files[name]:
            raise ValueError(f"{folder / name} lacks {tensor}, which the index says it holds; fetch it again")
    return _layout(files, version)


def shards(tensors: Mapping[str, Spec], max_bytes: int = 5 * 10**9, stem: str = "model", version: int = 0) -> Layout:
    """The layout of a Hugging Face directory of these tensors, in order, in files of at most `max_bytes` of data each
    (a larger tensor has a file of its own): `model.safetensors`, or `model-00001-of-00002.safetensors` and so on."""
    parts: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in tensors.items():
        if parts[-1] and size + spec.nbytes > max_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = spec
        size += spec.nbytes
    if len(parts) == 1:
        return _layout({f"{stem}.safetensors": parts[0]}, version)
    names = (f"{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts)))
    return _layout(dict(zip(names, parts, strict=True)), version)

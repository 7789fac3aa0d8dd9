"""The manifest: what a checkpoint consists of, and the names checkpoints have.

    checkpoints/step_00000100/model/...        a Hugging Face directory
                              state/...        optimizer shards and their layout
                              manifest.json    format, record, size and xxh3 of every other file
    checkpoints/latest                         the newest one's name

A folder without a manifest is not a checkpoint: it is one being written, or what a crash left of one. The manifest
carries a checksum of itself, so that a flipped bit in a counter is as visible as one in a weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import xxhash

from raytron.checkpoint.digest import Entry
from raytron.checkpoint.storage import DamagedFile, Storage

__all__ = ["FORMAT", "MANIFEST", "Manifest", "complete", "step_name", "temporary_name"]

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{8,})(\.old)?")


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's content.

    record: the training record (committed step, consumed samples, ...).
    files: path inside the checkpoint -> size and digest, of every file but the manifest itself.
    """

    record: Mapping[str, int | float]
    files: Mapping[str, Entry]

    def encode(self) -> bytes:
        body = {
            "format": FORMAT,
            "record": dict(self.record),
            "files": {path: list(entry) for path, entry in sorted(self.files.items())},
        }
        return json.dumps(body | {"xxh3": _checksum(body)}, indent=1).encode()

    @classmethod
    def read(cls, storage: Storage, checkpoint: str) -> Manifest:
        """Raises `DamagedFile` when it is missing or altered, `ValueError` when a newer raytron wrote it."""
        where = f"{storage}/{checkpoint}/{MANIFEST}"
        try:
            body = json.loads(storage.read(f"{checkpoint}/{MANIFEST}"))
            checksum = body.pop("xxh3")
            damaged = checksum != _checksum(body)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise DamagedFile(f"{where}: can't be read ({error})") from error
        if damaged:
            raise DamagedFile(f"{where}: its content is not what was written (xxh3 differs)")
        if body["format"] != FORMAT:
            raise ValueError(
                f"{where} has format {body['format']}, this raytron reads {FORMAT}; load it with the raytron that "
                "wrote it"
            )
        return cls(body["record"], {path: Entry(*entry) for path, entry in body["files"].items()})


def _checksum(body: Mapping) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode())


def step_name(step: int) -> str:
    """Folder of the checkpoint of a committed step."""
    return f"step_{step:08d}"


def temporary_name(checkpoint: str) -> str:
    """Where a checkpoint is written until it is whole; `complete` does not see it."""
    return f".{checkpoint}.tmp"


def complete(storage: Storage, most: int | None = None) -> list[str]:
    """Names of the checkpoints that exist, newest first; most: none of a later step.

    `step_N.old` is the former checkpoint of a step that was saved again; it counts until the new one has its name.
    """
    found = [(int(m[1]), m[2] is None, m[0]) for name in storage.folders() if (m := _NAME.fullmatch(name))]
    names = [name for step, *_, name in sorted(found, reverse=True) if most is None or step <= most]
    return [name for name in names if storage.size(f"{name}/{MANIFEST}") is not None]


def leftovers(storage: Storage) -> list[str]:
    """Folders that crashed saves left behind."""
    whole = set(complete(storage))
    names = [name for name in storage.folders() if name not in whole]
    return [name for name in names if _NAME.fullmatch(name) or _NAME.fullmatch(name[1:].removesuffix(".tmp"))]

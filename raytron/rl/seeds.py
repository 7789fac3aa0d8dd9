"""Chance as a pure function of names: the same keys give the same number in every process and order of work."""

from __future__ import annotations

import hashlib
import json
import random

__all__ = ["chance", "seed_of"]


def seed_of(*keys: int | str) -> int:
    """A number in [0, 2^63) that is fixed by `keys`; different keys give unrelated numbers (BLAKE2b)."""
    named = json.dumps([key if isinstance(key, str) else int(key) for key in keys])
    return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=8).digest(), "little") >> 1


def chance(*keys: int | str) -> random.Random:
    """A generator that starts at `seed_of(*keys)`."""
    return random.Random(seed_of(*keys))

"""The proof that an engine has the weights that were trained."""

from __future__ import annotations

from collections.abc import Mapping

from raytron.inference.types import Pushed, WeightUpdateError
from raytron.parallel.checksum import fold

__all__ = ["confirm"]


def confirm(sums: Mapping[str, int], pushed: Pushed) -> int:
    """`checksum.fold` of what an engine holds, if it is what was pushed. WeightUpdateError names the tensor if not."""
    for name in sorted({*sums, *pushed.checksums}):
        mine, theirs = sums.get(name), pushed.checksums.get(name)
        if mine != theirs:
            held, wanted = ("nothing" if n is None else f"checksum {n:016x}" for n in (mine, theirs))
            raise WeightUpdateError(f"{name}: the engine holds {held} where the trainer pushed {wanted}")
    return fold(sums)

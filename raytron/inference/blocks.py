"""Who holds which block of the cache. No torch: blocks are numbers here.

A full block is known by a digest of its tokens and of all before them, so a prompt that begins like an earlier one
finds that one's blocks still there (prefix caching). Blocks nobody holds keep their content until they are needed;
those unused for longest go first. Digests are 128 bits of BLAKE2b: a collision would show one user another's context,
so a short hash would not do.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

__all__ = ["BlockPool", "chain"]


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a block: of its tokens (32-bit), after those its parent's digest stands for."""
    return blake2b(array("i", tokens).tobytes(), digest_size=16, key=parent).digest()


class BlockPool:
    """Blocks 0 .. size-1, counted references, and the digests of those that are full.

    Every block is in exactly one state: held (references > 0), cached (free, content known), or blank.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._references = [0] * size
        self._digest: list[bytes | None] = [None] * size
        self._known: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(size))  # next to be taken first

    @property
    def free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    @property
    def held(self) -> int:
        """Blocks somebody holds."""
        return self.size - len(self._free)

    def take(self) -> int:
        """A block of one's own. Whatever it held is forgotten. The caller has seen that there is one."""
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def find(self, digest: bytes) -> int | None:
        """The block with this content, if there is one; `share` it before anything is taken."""
        return self._known.get(digest)

    def is_free(self, block: int) -> bool:
        """Whether nobody holds it: sharing it takes one off the free blocks."""
        return not self._references[block]

    def share(self, block: int) -> None:
        """One more holder."""
        if not self._references[block]:
            del self._free[block]
        self._references[block] += 1

    def publish(self, block: int, digest: bytes) -> None:
        """The block is full and holds this content. The first of several with the same content is the one found."""
        if digest not in self._known:
            self._forget(block)
            self._known[digest], self._digest[block] = block, digest

    def release(self, blocks: Sequence[int]) -> None:
        """One holder fewer for each, given in the order of the sequence: its end is reused before its beginning."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                if self._digest[block] is None:
                    self._free.move_to_end(block, last=False)

    def forget_all(self) -> None:
        """No content is valid any more (new weights); holders keep their blocks."""
        self._known.clear()
        self._digest = [None] * self.size

    def _forget(self, block: int) -> None:
        digest = self._digest[block]
        if digest is not None:
            del self._known[digest]
            self._digest[block] = None

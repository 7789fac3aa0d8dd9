"""Which replica gets a request: the one that has computed most of its prompt, unless that one is too busy.

A replica keeps the cache blocks of prompts it has answered, so a prompt that begins like an earlier one is cheaper
where that went. The router remembers where it sent the beginnings of prompts, as chained hashes of their blocks, and
nothing more: replicas are not asked. Between affinity and load the rule is SGLang's and Megatron's in spirit: follow
the prefix while the loads are near balance, else take the least loaded. A prompt nobody knows goes to one of the least
loaded, by rendezvous hashing of its first block, so that several routers agree without talking. No Ray, no clock, no
chance.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

__all__ = ["PrefixMap", "choose"]


def choose(matches: Mapping[str, int], loads: Mapping[str, int], slack: int, tie: int = 0) -> str:
    """The replica to send to.

    Args:
        matches: replica -> leading blocks of the prompt it is thought to hold; absent ones hold none.
        loads: replica -> requests in flight there; every candidate, at least one.
        slack: a replica may have so many requests more than the least loaded one and still be followed for its prefix.
        tie: any number that is the same for prompts which should meet; decides between equals.
    """
    least = min(loads.values())
    near = [replica for replica, load in loads.items() if load <= least + slack]
    most = max(matches.get(replica, 0) for replica in near)
    if most:
        near = [replica for replica in near if matches.get(replica, 0) == most]
    least = min(loads[replica] for replica in near)
    return max((r for r in near if loads[r] == least), key=lambda r: (zlib.crc32(f"{tie}/{r}".encode()), r))


class PrefixMap:
    """Where the beginnings of prompts were sent.

    Args:
        block: tokens of a block; beginnings shorter than one are not told apart from others.
        depth: blocks of a prompt that are looked at.
        remember: blocks remembered; those not seen for longest are forgotten first.
        slack: see `choose`.
    """

    def __init__(self, block: int = 32, depth: int = 64, remember: int = 65536, slack: int = 8) -> None:
        self.block, self.depth, self.remember, self.slack = block, depth, remember, slack
        self._holders: OrderedDict[int, set[str]] = OrderedDict()

    def send(self, prompt: Sequence[int], loads: Mapping[str, int]) -> str:
        """Choose a replica among those of `loads` (replica -> requests in flight), and remember the choice."""
        hashes = self._hashes(prompt)
        matches: dict[str, int] = {}
        for at, name in enumerate(hashes):
            holders = self._holders.get(name, set()) & loads.keys()
            if not holders:
                break
            matches |= dict.fromkeys((r for r in holders if matches.get(r, 0) == at), at + 1)
        replica = choose(matches, loads, self.slack, hashes[0] if hashes else 0)
        for name in hashes:
            self._holders.setdefault(name, set()).add(replica)
            self._holders.move_to_end(name)
        while len(self._holders) > self.remember:
            self._holders.popitem(last=False)
        return replica

    def keep(self, replicas: Collection[str]) -> None:
        """Forget every replica that is not among these."""
        kept = set(replicas)
        for name, holders in list(self._holders.items()):
            holders &= kept
            if not holders:
                del self._holders[name]

    def __len__(self) -> int:
        return len(self._holders)

    def _hashes(self, prompt: Sequence[int]) -> list[int]:
        result, last = [], 0
        for start in range(0, min(len(prompt), self.block * self.depth) - self.block + 1, self.block):
            last = hash((last, *prompt[start : start + self.block]))
            result.append(last)
        return result

"""Which tokens of which sequences the next step computes. No torch, no model.

    waiting, a queue for each client --admit--> running --finish--> gone
                 ^                                 |
                 +--------- preempt ---------------+    no block left: the newest gives up its blocks

A step is a list of `Work`: so many tokens of a sequence, those whose keys and values are not in the cache yet. Outputs
being written come first, one token each; what is left of the token budget goes to prompts, in chunks, so a long prompt
never holds up what is being written. Clients are admitted in turns. A preempted sequence starts over, its own output
now part of the prompt, and finds what is still cached (Kwon et al. 2023 call it recomputation).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from raytron.inference.blocks import BlockPool, chain
from raytron.inference.types import Request

__all__ = ["Scheduler", "Sequence", "Work"]


@dataclass(eq=False, slots=True)
class Sequence:
    """One of a request's n sequences.

    tokens: prompt and output. prompt: how many are the prompt. computed: how many have keys and values in the cache.
    blocks: those it holds, in order; the first `published` can be found by others. digests: of its full blocks, as far
    as they were needed. slot: its row in the tables while it runs, else -1. cached: prompt tokens that were found in
    the cache at first admission, -1 before. state: what the engine keeps with it.
    """

    request: Request
    index: int
    tokens: list[int]
    prompt: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    published: int = 0
    slot: int = -1
    cached: int = -1
    state: Any = None


class Work(NamedTuple):
    """Tokens [start, start + count) of a sequence; `last`: its newest token is among them, so one is sampled."""

    sequence: Sequence
    start: int
    count: int
    last: bool


class Scheduler:
    """Decides what runs.

    Args:
        pool: blocks of the cache.
        block_size: tokens of a block.
        max_seqs: sequences running together.
        max_tokens: tokens of one step.
        max_len: tokens of one sequence; the pool holds at least one sequence of that length.
        prefix_caching: look for blocks with the same beginning.

    Attributes:
        tables: int32 [max_seqs, blocks of the longest sequence], the blocks of the sequence in each slot.
        running: in the order of admission.
        preemptions: how often a sequence had to start over.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        *,
        max_seqs: int,
        max_tokens: int,
        max_len: int,
        prefix_caching: bool = True,
    ) -> None:
        width = -(-max_len // block_size)
        if width > pool.size:
            raise ValueError(f"a cache of {pool.size} blocks of {block_size} tokens cannot hold {max_len} tokens")
        self.pool, self.block_size, self.max_seqs, self.max_tokens = pool, block_size, max_seqs, max_tokens
        self.prefix_caching = prefix_caching
        self.tables = np.zeros((max_seqs, width), dtype=np.int32)
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._slots = list(range(max_seqs - 1, -1, -1))
        self._preempted: deque[Sequence] = deque()
        self._waiting: OrderedDict[str, deque[Sequence]] = OrderedDict()  # clients; the one whose turn it is first

    @property
    def waiting(self) -> int:
        """Sequences that are not running."""
        return len(self._preempted) + sum(map(len, self._waiting.values()))

    def unfinished(self) -> list[Sequence]:
        """All sequences, running first."""
        return [*self.running, *self._preempted, *(s for queue in self._waiting.values() for s in queue)]

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of its client's queue."""
        self._waiting.setdefault(sequence.request.client, deque()).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and free what it holds."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._give_back(sequence)
            return
        client = sequence.request.client
        queue = self._preempted if sequence in self._preempted else self._waiting[client]
        queue.remove(sequence)
        if not self._waiting.get(client, True):
            del self._waiting[client]

    def recompute_all(self) -> None:
        """What is cached is void (new weights): running sequences start over, in their order, before all others."""
        self.pool.forget_all()
        for sequence in reversed(self.running.copy()):
            self._preempt(sequence)

    def schedule(self, admit: bool = True) -> list[Work]:
        """The next step: at most `max_tokens` tokens; empty when there is nothing to do. Blocks are taken for it."""
        work: list[Work] = []
        budget = self.max_tokens
        writing = [s for s in self.running if len(s.tokens) - s.computed == 1]
        reading = [s for s in self.running if len(s.tokens) - s.computed > 1]
        for sequence in (*writing, *reading):
            if budget and sequence.slot >= 0 and self._make_room(sequence, budget, work):
                budget -= self._put(sequence, budget, work)
        while admit and budget and self._slots and (sequence := self._next()) is not None:
            if not self._admit(sequence):
                break
            budget -= self._put(sequence, budget, work)
        return work

    def _put(self, sequence: Sequence, budget: int, work: list[Work]) -> int:
        """Plan as much of the sequence as the budget allows; its blocks are there. The number of tokens."""
        left = len(sequence.tokens) - sequence.computed
        count = min(left, budget)
        self._extend(sequence, sequence.computed + count)
        work.append(Work(sequence, sequence.computed, count, count == left))
        sequence.computed += count
        if self.prefix_caching:
            self._publish(sequence)
        return count

    # Blocks

    def _needed(self, sequence: Sequence, tokens: int) -> int:
        return -(-tokens // self.block_size) - len(sequence.blocks)

    def _make_room(self, sequence: Sequence, budget: int, work: list[Work]) -> bool:
        """Free blocks for the sequence's next tokens by preempting the newest; False if it had to go itself."""
        end = sequence.computed + min(len(sequence.tokens) - sequence.computed, budget)
        while self._needed(sequence, end) > self.pool.free:
            planned = {w.sequence for w in work}
            victim = next(s for s in reversed(self.running) if s not in planned)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.computed = 0
        self._preempted.appendleft(sequence)
        self.preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks.clear()
        self._slots.append(sequence.slot)
        sequence.slot, sequence.published = -1, 0

    def _extend(self, sequence: Sequence, tokens: int) -> None:
        for _ in range(self._needed(sequence, tokens)):
            self._append(sequence, self.pool.take())

    def _append(self, sequence: Sequence, block: int) -> None:
        self.tables[sequence.slot, len(sequence.blocks)] = block
        sequence.blocks.append(block)

    # Admission

    def _next(self) -> Sequence | None:
        if self._preempted:
            return self._preempted[0]
        return next(iter(self._waiting.values()))[0] if self._waiting else None

    def _admit(self, sequence: Sequence) -> bool:
        """Give the first in line a slot and what the cache knows of it; False if its prompt does not fit now."""
        found = self._find(sequence)
        taken = sum(map(self.pool.is_free, found))
        needed = self._needed(sequence, len(sequence.tokens)) - len(found)
        # A block for each of the others keeps the newcomer from being thrown out at once.
        if needed + taken + min(len(self.running), self.pool.size // 8) > self.pool.free:
            return False
        self._leave_queue(sequence)
        sequence.slot = self._slots.pop()
        self.running.append(sequence)
        for block in found:
            self.pool.share(block)
            self._append(sequence, block)
        sequence.published = len(found)
        sequence.computed = len(found) * self.block_size
        if sequence.cached < 0:
            sequence.cached = min(sequence.computed, sequence.prompt)
        return True

    def _leave_queue(self, sequence: Sequence) -> None:
        if self._preempted and self._preempted[0] is sequence:
            self._preempted.popleft()
            return
        client = sequence.request.client
        self._waiting[client].popleft()
        if self._waiting[client]:
            self._waiting.move_to_end(client)
        else:
            del self._waiting[client]

    def _find(self, sequence: Sequence) -> list[int]:
        """Blocks in the cache that hold its beginning. Its last token is always computed: something is asked of it."""
        if not self.prefix_caching or sequence.request.params.prompt_logprobs is not None:
            return []
        found = []
        for i in range((len(sequence.tokens) - 1) // self.block_size):
            block = self.pool.find(self._digest(sequence, i))
            if block is None:
                break
            found.append(block)
        return found

    def _digest(self, sequence: Sequence, i: int) -> bytes:
        digests, size = sequence.digests, self.block_size
        while len(digests) <= i:
            at = len(digests)
            digests.append(chain(digests[-1] if at else b"", sequence.tokens[at * size : (at + 1) * size]))
        return digests[i]

    def _publish(self, sequence: Sequence) -> None:
        """Full blocks become findable as soon as they are planned: a step fills them before anything reads them."""
        for i in range(sequence.published, sequence.computed // self.block_size):
            self.pool.publish(sequence.blocks[i], self._digest(sequence, i))
            sequence.published = i + 1

"""Every block is held, cached or blank, whatever happens; and what is found is what was published."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raytron.inference.blocks import BlockPool, chain


def test_a_digest_stands_for_a_block_and_all_before_it():
    first, second = chain(b"", [1, 2]), chain(b"", [3, 4])
    assert chain(first, [5, 6]) != chain(second, [5, 6])
    assert chain(first, [5, 6]) == chain(chain(b"", [1, 2]), [5, 6])
    assert first != chain(b"", [1, 2, 0])


def test_blocks_unused_for_longest_go_first_and_an_end_before_its_beginning():
    pool = BlockPool(4)
    old, new = [pool.take(), pool.take()], [pool.take(), pool.take()]
    for block in (*old, *new):
        pool.publish(block, bytes([block]))
    pool.release(old)
    pool.release(new)
    assert [pool.take() for _ in range(4)] == [old[1], old[0], new[1], new[0]]


class Pool(RuleBasedStateMachine):
    """A pool beside a plain account of it: references by block, and content by block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.holders: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @precondition(lambda self: self.pool.free)
    @rule()
    def take(self) -> None:
        block = self.pool.take()
        assert all(block not in held for held in self.holders)
        self.content.pop(block, None)
        self.holders.append([block])

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), number=st.integers(0, 9))
    def publish(self, data, number) -> None:
        block = data.draw(st.sampled_from(self.holders))[-1]
        digest = bytes([number])
        if digest not in self.content.values():
            self.content[block] = digest
        self.pool.publish(block, digest)

    @rule(number=st.integers(0, 9))
    def share_what_is_found(self, number) -> None:
        block = self.pool.find(bytes([number]))
        assert block == next((b for b, digest in self.content.items() if digest == bytes([number])), None)
        if block is not None:
            assert self.pool.is_free(block) == all(block not in held for held in self.holders)
            self.pool.share(block)
            self.holders.append([block])

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data) -> None:
        at = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.release(self.holders.pop(at))

    @rule()
    def forget(self) -> None:
        self.pool.forget_all()
        self.content.clear()

    @invariant()
    def held_and_free_are_all(self) -> None:
        held = {block for blocks in self.holders for block in blocks}
        assert self.pool.held == len(held)
        assert self.pool.free == self.pool.size - len(held)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

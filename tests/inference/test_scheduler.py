"""The scheduler beside a model that is nothing: what it plans is always possible, and everybody is served."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.inference.blocks import BlockPool
from raytron.inference.scheduler import Scheduler, Sequence
from raytron.inference.types import Request, SamplingParams

BLOCK = 4


def scheduler(blocks: int = 12, seqs: int = 3, tokens: int = 10, length: int = 40, caching: bool = True) -> Scheduler:
    return Scheduler(BlockPool(blocks), BLOCK, max_seqs=seqs, max_tokens=tokens, max_len=length, prefix_caching=caching)


def sequence(name: str, prompt: list[int], client: str = "") -> Sequence:
    return Sequence(Request(name, tuple(prompt), SamplingParams(), client), 0, list(prompt), len(prompt))


def written(plan: Scheduler, memory: dict[int, list], work) -> None:
    """Carry out a step: tokens go to their blocks; then what attention would read must be there."""
    for w in work:
        for at in range(w.start, w.start + w.count):
            block = plan.tables[w.sequence.slot, at // BLOCK]
            memory.setdefault(int(block), [None] * BLOCK)[at % BLOCK] = tuple(w.sequence.tokens[: at + 1])
    for w in work:
        for at in range(w.start + w.count):
            block = plan.tables[w.sequence.slot, at // BLOCK]
            assert memory[int(block)][at % BLOCK] == tuple(w.sequence.tokens[: at + 1])


@given(
    st.lists(st.tuples(st.integers(1, 24), st.integers(1, 14), st.integers(0, 2)), min_size=1, max_size=8),
    st.integers(2, 14),
    st.integers(10, 16),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=150)
def test_everybody_is_served_and_reads_what_was_written_for_it(requests, tokens, blocks, caching, random):
    """Prompts share beginnings; blocks are few, so some are preempted; some are aborted; nobody waits for ever."""
    plan = scheduler(blocks=blocks, tokens=tokens, caching=caching)
    todo: dict[Sequence, int] = {}
    for i, (prompt, output, family) in enumerate(requests):
        made = sequence(str(i), [family] * min(prompt, 9) + list(range(max(0, prompt - 9))), client=str(family))
        plan.add(made)
        todo[made] = output
    memory: dict[int, list] = {}
    for _ in range(2000):
        if not todo:
            break
        work = plan.schedule()
        assert work, "work is left and nothing is planned"
        assert sum(w.count for w in work) <= tokens
        assert len({w.sequence for w in work}) == len(work)
        assert len(plan.running) <= plan.max_seqs
        written(plan, memory, work)
        for w in work:
            assert w.last == (w.sequence.computed == len(w.sequence.tokens))
            if w.last:
                w.sequence.tokens.append(random.randrange(5))
                todo[w.sequence] -= 1
        for done in [s for s, left in todo.items() if left == 0 or random.random() < 0.01]:
            plan.remove(done)
            del todo[done]
        if random.random() < 0.02:
            plan.recompute_all()
            memory.clear()
    assert not todo
    assert plan.pool.held == 0
    assert plan.waiting == 0
    assert not plan.running


def test_a_prompt_that_begins_alike_shares_blocks_even_within_one_step():
    plan = scheduler(tokens=40, blocks=20)
    for name in "abc":
        plan.add(sequence(name, list(range(10))))
    work = plan.schedule()
    assert [(w.start, w.count) for w in work] == [(0, 10), (8, 2), (8, 2)]
    assert [w.sequence.cached for w in work] == [0, 8, 8]
    assert plan.pool.held == 2 + 3


def test_outputs_under_way_are_never_held_up_by_a_long_prompt():
    plan = scheduler(tokens=6, blocks=20)
    writing = sequence("short", [1, 2])
    plan.add(writing)
    plan.schedule()
    plan.add(sequence("long", list(range(30))))
    for _ in range(5):
        writing.tokens.append(0)
        work = plan.schedule()
        assert work[0][:3] == (writing, writing.computed - 1, 1)
        assert work[1].count == 5


def test_clients_are_admitted_in_turns():
    plan = scheduler(seqs=1, tokens=40)
    for i in range(4):
        plan.add(sequence(f"flood{i}", [1, 2, 3], client="flood"))
    plan.add(sequence("one", [1, 2, 3], client="one"))
    order = []
    while plan.waiting:
        (work,) = plan.schedule()
        order.append(work.sequence.request.id)
        plan.remove(work.sequence)
    assert order == ["flood0", "one", "flood1", "flood2", "flood3"]


def test_the_newest_gives_way_and_comes_back_first():
    plan = scheduler(blocks=6, seqs=3, tokens=40, length=24, caching=False)
    old, new = sequence("old", [1] * 8), sequence("new", [2] * 8)
    for each in (old, new):
        plan.add(each)
    plan.schedule()
    plan.add(sequence("later", [3]))
    for _ in range(14):
        for each in (old, new):
            if each.slot >= 0:
                each.tokens.append(0)
        plan.schedule()
        if plan.preemptions:
            break
    assert new.slot < 0 <= old.slot
    plan.remove(old)
    assert plan.schedule()[0].sequence is new


def test_new_weights_void_what_is_cached():
    plan = scheduler(tokens=40, blocks=20)
    first = sequence("a", list(range(10)))
    plan.add(first)
    plan.schedule()
    plan.recompute_all()
    plan.add(sequence("b", list(range(10))))
    work = plan.schedule()
    assert [(w.sequence.request.id, w.start) for w in work] == [("a", 0), ("b", 8)]

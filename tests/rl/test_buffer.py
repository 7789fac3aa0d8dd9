"""Which groups start and which make a batch: nothing lost, nothing twice, nothing too old; and the journal's bytes."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.rl.buffer import Buffer, Journal, from_line, to_line
from raytron.rl.types import Group, Trajectory


def trajectory(reward: float | None = 1.0, version: int = 0, length: int = 3) -> Trajectory:
    tokens = np.arange(length + 2)
    chosen = tokens >= 2
    return Trajectory(tokens, chosen, np.where(chosen, -0.1 * tokens, 0), np.where(chosen, version, -1), reward)


def group(index: int, *rewards: float | None, version: int = 0) -> Group:
    return Group(index, tuple(trajectory(r, version) for r in rewards or (1.0, 0.0)))


@given(
    size=st.integers(1, 4),
    steps=st.integers(1, 6),
    staleness=st.integers(0, 3),
    seed=st.integers(0, 2**32),
    drop=st.floats(0, 0.7),
)
def test_every_batch_is_the_next_kept_groups_in_order_and_none_is_too_old(size, steps, staleness, seed, drop):
    chance = random.Random(seed)
    kept_of = {}

    def keep(g: Group) -> bool:
        return kept_of.setdefault(g.index, chance.random() >= drop)

    buffer = Buffer(size, steps, staleness, keep)
    begun: dict[int, int] = {}
    trained: list[int] = []
    passed: list[int] = []
    while buffer.version < steps:
        for index in buffer.admit():
            assert index not in begun
            begun[index] = buffer.version
        if (batch := buffer.batch()) is None:
            # Whatever finishes first: if nothing is under way and no batch is ready, nobody will ever be.
            index = chance.choice(buffer.started)
            buffer.put(group(index, version=begun[index]))
            continue
        assert len(batch) == size
        for g in batch:
            assert buffer.version - begun[g.index] <= staleness
        trained += [g.index for g in batch]
        passed += [g.index for g in buffer.passed_over()]
        buffer.trained()
    decided = [i for i in sorted(kept_of) if kept_of[i]]
    assert trained == decided[: size * steps]
    assert passed == [i for i in range(trained[-1]) if not kept_of[i]], "each once, with the batch that left it behind"
    assert staleness or not buffer.started


def test_synchronous_runs_begin_nothing_ahead():
    buffer = Buffer(2, 3)
    assert buffer.admit() == [0, 1]
    assert buffer.admit() == []
    buffer.put(group(1))
    assert buffer.batch() is None
    buffer.put(group(0))
    assert [g.index for g in buffer.batch()] == [0, 1]
    assert buffer.admit() == []
    buffer.trained()
    assert buffer.admit() == [2, 3]


def test_a_group_that_is_not_kept_makes_room_for_another():
    buffer = Buffer(2, 1, least=2)
    buffer.admit()
    assert not buffer.put(group(0, 1.0, None))  # one valid trajectory of two: nothing to compare with
    assert buffer.admit() == [2]
    buffer.put(group(2))
    buffer.put(group(1))
    assert [g.index for g in buffer.batch()] == [1, 2]
    assert buffer.rejected == 1


def test_a_slow_group_is_waited_for():
    buffer = Buffer(1, 3, max_staleness=2)
    assert buffer.admit() == [0, 1, 2]
    buffer.put(group(1))
    buffer.put(group(2))
    assert buffer.batch() is None
    buffer.put(group(0))
    assert [g.index for g in buffer.batch()] == [0]


@given(st.integers(0, 4), st.sets(st.integers(0, 12)), st.integers(0, 2))
def test_after_a_crash_recorded_groups_are_not_rolled_out_again(version, recorded, staleness):
    size = 2
    recorded |= set(range(version * size))  # what was trained on is in the journal
    buffer = Buffer(size, 5, staleness, version=version)
    for index in sorted(recorded, key=lambda i: hash((i, 7))):
        buffer.put(group(index))
    buffer.forget_trained()
    trained = list(range(version * size))
    while buffer.version < 5:
        begun = buffer.admit()
        assert not recorded & set(begun)
        for index in begun:
            buffer.put(group(index))
        trained += [g.index for g in buffer.batch()]
        buffer.trained()
    assert trained == list(range(10))


def test_a_journal_that_lacks_what_was_trained_on_is_refused():
    buffer = Buffer(2, 5, version=2)
    for index in range(3):
        buffer.put(group(index))
    with pytest.raises(ValueError, match="3 of the 4 groups"):
        buffer.forget_trained()


LINES = st.builds(
    lambda rewards, length, info: Group(
        7, tuple(replace(trajectory(r, 3, length), info=info, truncated=length > 2) for r in rewards)
    ),
    st.lists(st.one_of(st.none(), st.floats(-5, 5)), max_size=3),
    st.integers(0, 5),
    st.dictionaries(st.text(max_size=4), st.one_of(st.text(max_size=5), st.floats(-1, 1)), max_size=2),
)


def same(a: Group, b: Group) -> bool:
    arrays = ("tokens", "chosen", "logprobs", "versions")
    return a.index == b.index and len(a.trajectories) == len(b.trajectories) and all(
        all(np.array_equal(getattr(s, n), getattr(t, n)) for n in arrays)
        and (s.reward, s.truncated, dict(s.info)) == (t.reward, t.truncated, dict(t.info))
        for s, t in zip(a.trajectories, b.trajectories, strict=True)
    )  # fmt: skip


@given(LINES)
def test_a_group_comes_back_to_the_bit(wanted):
    assert same(from_line(to_line(wanted)), wanted)


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at, change):
    line = bytearray(to_line(group(3)))
    line[at % len(line)] ^= change
    with pytest.raises(ValueError, match=r"damaged|checksum"):
        from_line(bytes(line))


def test_a_torn_last_line_is_cut_off_and_a_damaged_one_inside_is_named(tmp_path):
    journal = Journal(tmp_path / "groups.jsonl")
    assert list(journal.recover()) == []
    journal.group(group(0))
    journal.group(group(0, 5.0))  # known already
    journal.step(1, (0,))
    journal.group(group(1))
    journal.close()
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-5])
    again = Journal(journal.path)
    assert [g.index for g in again.recover()] == [0]
    again.group(group(1))
    again.step(1, (0,))  # the same step again, after a rewind
    with pytest.raises(ValueError, match="step 1 was trained on groups"):
        again.step(1, (1,))
    again.close()
    assert [g.rewards.tolist() for g in Journal(journal.path).recover()] == [[1.0, 0.0], [1.0, 0.0]]
    journal.path.write_bytes(whole.replace(b"index", b"indey", 1))
    with pytest.raises(ValueError, match=r"groups.jsonl:1"):
        list(Journal(journal.path).recover())

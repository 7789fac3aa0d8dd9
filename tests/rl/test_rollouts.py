"""Rollouts ahead of training, without engines: what is launched, recorded, and what happens when it fails."""

from __future__ import annotations

import asyncio

import pytest

from raytron.rl.buffer import Buffer, Journal
from raytron.rl.rollouts import Rollouts
from raytron.rl.types import Group
from tests.rl.batches import trajectory
from tests.rl.test_buffer import group


def journal_of(tmp_path) -> Journal:
    journal = Journal(tmp_path / "rollouts.jsonl")
    assert not list(journal.recover())
    return journal


def test_batches_come_in_order_whatever_finishes_first(tmp_path):
    async def play() -> list[list[int]]:
        gates = {index: asyncio.Event() for index in range(6)}

        async def roll(index: int) -> Group:
            await gates[index].wait()
            return group(index)

        rollouts = Rollouts(Buffer(2, 3, max_staleness=1), journal_of(tmp_path), roll)
        found = []
        for batch in range(3):
            waiting = asyncio.create_task(rollouts.next_batch())
            for index in (2 * batch + 1, 2 * batch):
                gates[index].set()
            found.append([g.index for g in await waiting])
            rollouts.buffer.trained()
        return found

    assert asyncio.run(play()) == [[0, 1], [2, 3], [4, 5]]
    assert sorted(g.index for g in Journal(tmp_path / "rollouts.jsonl").recover()) == list(range(6))


def test_what_is_not_kept_is_replaced_and_recorded(tmp_path):
    async def roll(index: int) -> Group:
        return group(index, 1.0, 1.0) if index % 2 else group(index, 1.0, 0.0)

    async def play() -> list[int]:
        buffer = Buffer(2, 1, keep=lambda g: g.rewards.std() > 0)
        return [g.index for g in await Rollouts(buffer, journal_of(tmp_path), roll).next_batch()]

    assert asyncio.run(play()) == [0, 2]
    assert len(list(Journal(tmp_path / "rollouts.jsonl").recover())) == 3


def test_a_rollout_that_cannot_be_answered_ends_the_run(tmp_path):
    async def roll(index: int) -> Group:
        raise RuntimeError("no engine is left")

    with pytest.raises(RuntimeError, match="no engine"):
        asyncio.run(Rollouts(Buffer(1, 1), journal_of(tmp_path), roll).next_batch())


def test_a_stop_ends_the_wait_and_cancels_what_is_under_way(tmp_path):
    cancelled = []

    async def roll(index: int) -> Group:
        try:
            return await asyncio.Future()
        except asyncio.CancelledError:
            cancelled.append(index)
            raise

    async def play() -> None:
        rollouts = Rollouts(Buffer(2, 1), journal_of(tmp_path), roll)
        looked = iter([False, True])
        assert await rollouts.next_batch(lambda: next(looked, True)) is None
        await rollouts.cancel()

    asyncio.run(play())
    assert sorted(cancelled) == [0, 1]


def test_a_run_whose_answers_nobody_can_judge_ends(tmp_path):
    async def roll(index: int) -> Group:
        return Group(index, (trajectory("##", None),))

    rollouts = Rollouts(Buffer(2, 3), journal_of(tmp_path), roll)
    with pytest.raises(RuntimeError, match="no answer of the last 8 prompts could be judged"):
        asyncio.run(rollouts.next_batch())
    assert rollouts.excluded >= 8

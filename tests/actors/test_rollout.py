"""The rollout group: answers are those of one engine, whatever engines there are and whichever of them die."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytron.actors import ActorGroup, RolloutError, RolloutGroup, Session
from raytron.actors.fleet import Health, Progress
from raytron.actors.placement import CapacityError
from raytron.config import EngineConfig, FailureConfig
from raytron.inference import NativeEngine, Request, SamplingParams
from raytron.parallel import Mesh
from tests.actors import rollouts

EACH = {"CPU": 0.5}
PROMPTS = [tuple(range(1 + i, 9 + 2 * i)) for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return rollouts.save(tmp_path_factory.mktemp("model"))


def config(folder: str, **options: Any) -> EngineConfig:
    return EngineConfig(path=folder, **{**rollouts.CONFIG, **options})


def params(seed: int, tokens: int = 12) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=tokens, ignore_eos=True)


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    """A test's coroutine, with minutes to end on a busy machine."""
    return asyncio.run(asyncio.wait_for(main(), 240))


@pytest.fixture(scope="module")
def expected(folder) -> dict[tuple[int, int], list[int]]:
    """Tokens of every prompt and seed by one engine in this process."""
    engine = NativeEngine(config(folder))
    tokens: dict[tuple[int, int], list[int]] = {}
    for number, prompt in enumerate(PROMPTS):
        for seed in range(4):
            engine.add(Request(f"{number} {seed}", prompt, params(seed)))
    while engine.has_unfinished():
        for output in engine.step():
            number, seed = map(int, output.request_id.split())
            tokens.setdefault((number, seed), []).extend(output.token_ids)
    engine.close()
    return tokens


async def all_of(group: RolloutGroup) -> dict[tuple[int, int], list[int]]:
    asked = [(number, seed) for number in range(len(PROMPTS)) for seed in range(4)]
    found = await asyncio.gather(*(group.generate(PROMPTS[n], params(s), group=n) for n, s in asked))
    for one in found:
        assert one.finish_reason == "length"
        assert one.token_ids.dtype == one.versions.dtype == np.int32
        assert one.logprobs.dtype == np.float32
        assert len(one.token_ids) == len(one.logprobs) == len(one.versions) == 12
        assert (one.versions == 0).all()
    return {key: one.token_ids.tolist() for key, one in zip(asked, found, strict=True)}


LAYOUTS = [
    pytest.param([{}], id="one", marks=pytest.mark.slow),
    pytest.param([{}, {}], id="two", marks=pytest.mark.slow),
    pytest.param([{}, {"tp": 2}, {"pp": 2}], id="mixed"),
]


@pytest.mark.parametrize("engines", LAYOUTS)
def test_answers_are_those_of_one_engine(cluster: Session, folder, expected, engines):
    async def main() -> None:
        async with RolloutGroup([config(folder, **options) for options in engines], EACH) as group:
            assert await all_of(group) == expected
            stats = await group.stats()
            assert sum(one.finished for one in stats.values()) == 16
            assert all(one.finished for one in stats.values())  # every engine had something to do
            assert sum(map(group.outstanding, range(len(group.configs)))) == 0
            assert group.max_model_len == 256

    run(main)


def test_requests_of_one_turn_travel_in_one_message(cluster: Session, folder):
    async def main() -> None:
        async with RolloutGroup([config(folder)], EACH) as group:
            sent = []
            actor = group._actors[0]

            class Counted:
                def __getattr__(self, name: str) -> Any:
                    if name == "submit":
                        sent.append(None)
                    return getattr(actor, name)

            group._actors[0] = Counted()
            found = await asyncio.gather(*(group.generate(PROMPTS[0], params(seed), group=0) for seed in range(16)))
            assert len({tuple(one.token_ids.tolist()) for one in found}) > 1
            assert len(sent) == 1
            assert max(one.cached_tokens for one in found) >= 0
            group._actors[0] = actor

    run(main)


def test_what_can_never_be_answered_is_that_requests_error(cluster: Session, folder):
    async def main() -> None:
        async with RolloutGroup([config(folder)], EACH) as group:
            good = asyncio.ensure_future(group.generate(PROMPTS[0], params(0)))
            with pytest.raises(ValueError, match="exceeds the context of 256"):
                await group.generate(tuple(range(50)) * 6, params(0))
            with pytest.raises(ValueError, match="ask for each sample by itself"):
                await group.generate(PROMPTS[0], SamplingParams(n=2))
            assert len((await good).token_ids) == 12
            late = asyncio.ensure_future(group.generate(PROMPTS[0], params(0, 200)))
            await asyncio.sleep(0)
            late.cancel()
            with pytest.raises(asyncio.CancelledError):
                await late
            assert sum(map(group.outstanding, range(len(group.configs)))) == 0
            last = asyncio.ensure_future(group.generate(PROMPTS[0], params(0, 200)))
            await asyncio.sleep(0)
        with pytest.raises(RolloutError, match="was closed"):
            await last
        with pytest.raises(RolloutError, match="was closed"):
            await group.generate(PROMPTS[0], params(0))

    run(main)


def test_requests_of_a_killed_engine_are_issued_again_and_the_engine_comes_back(cluster: Session, folder, expected):
    async def main() -> None:
        configs, states = [config(folder), config(folder)], []
        async with RolloutGroup(configs, EACH, failures=FailureConfig(max_failures=2)) as group:
            group.on_state = lambda engine, what: states.append((engine, what))
            answers = asyncio.ensure_future(all_of(group))
            await asyncio.sleep(0)  # they are on their way
            os.kill(group._started[0].pid, signal.SIGKILL)
            assert await answers == expected
            while group.fleet.failures == 0 or 0 not in group.fleet.ready:
                await asyncio.sleep(0.05)
            assert group.fleet.failures == 1
            assert await all_of(group) == expected
            assert (await group.stats())[0].finished > 0
            assert {what for engine, what in states if engine == 0} == {"generating", "restarting", "idle"}
            assert {what for engine, what in states if engine == 1} == {"generating", "idle"}
            assert dict(states) == {0: "idle", 1: "idle"}

    run(main)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("step", "did not answer within"),
        pytest.param("stop", "did not answer within", marks=pytest.mark.slow),
        pytest.param("spin", "made no progress", marks=pytest.mark.slow),
    ],
)
def test_an_engine_that_hangs_is_replaced_and_its_requests_are_issued_again(
    cluster: Session, tmp_path, expected, how, reason
):
    folder = rollouts.save(tmp_path / "model")
    hang = Path(folder, "hang")

    async def main() -> None:
        failures = FailureConfig(max_failures=-1)
        async with RolloutGroup(
            [config(folder)], EACH, failures=failures, attempts=9, timeout_s=1.0, start=rollouts.hanging
        ) as group:
            first = group._started[0].pid
            hang.write_text(how)
            answers = asyncio.ensure_future(all_of(group))
            while group.fleet.failures == 0:
                await asyncio.sleep(0.05)
            hang.unlink(missing_ok=True)
            assert await answers == expected
            assert reason in group.fleet.states[0].reason
            assert group._started[0].pid != first

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_takes_its_engine_along(cluster: Session, folder, expected, how):
    async def main() -> None:
        options = {"failures": FailureConfig(max_failures=1), "timeout_s": 10.0, "start": rollouts.telling}
        async with RolloutGroup([config(folder, tp=2)], EACH, **options) as group:
            await all_of(group)
            os.kill(int(Path(folder, "second").read_text()), how)
            assert await all_of(group) == expected
            assert group.fleet.failures == 1

    run(main)


def test_engines_join_and_leave_under_requests_and_none_is_lost(cluster: Session, folder, expected):
    """A leaving engine finishes what it has, or others answer it; the last but one may even die on the way."""

    async def main() -> None:
        events = []
        async with RolloutGroup([config(folder)], EACH, bounds=(1, 3)) as group:
            group.on_event = lambda event, engine, **_: events.append((event, engine))

            async def until(event: str, engine: int) -> None:
                while (event, engine) not in events:
                    await asyncio.sleep(0.02)

            assert group.grow(2) == (1, 2)
            await until("joined", 1)
            await until("joined", 2)
            answers = asyncio.ensure_future(all_of(group))
            while sum(row["requests"] for row in group.members()) < 16:  # they are on their way
                await asyncio.sleep(0)
            group.retire(0, "the test wants it", within_s=0.0)
            group.retire(1, "the test wants it", within_s=200.0)
            await asyncio.sleep(0)
            assert group.fleet.ready == (2,)
            assert await answers == expected
            await until("left", 0)
            await until("left", 1)
            assert [(row["engine"], row["state"]) for row in group.members()] == [(2, "ready")]
            assert await all_of(group) == expected
            assert group.grow(1) == (3,)
            group.retire(3, "after all not", within_s=0.0)
            assert ("left", 3) in events
            assert sum(map(group.outstanding, range(len(group.configs)))) == 0
            assert group.fleet.failures == 0
            assert await all_of(group) == expected

    run(main)


def test_when_no_engine_is_left_all_requests_fail(cluster: Session, folder):
    async def main() -> None:
        async with RolloutGroup([config(folder)], EACH, failures=FailureConfig()) as group:
            answer = asyncio.ensure_future(group.generate(PROMPTS[0], params(0, 200)))
            await asyncio.sleep(0)
            os.kill(group._started[0].pid, signal.SIGKILL)
            with pytest.raises(RolloutError, match="no engine is left to answer"):
                await answer
            assert group.fleet.of(Health.LOST) == (0,)
            with pytest.raises(RolloutError, match="no engine is left to answer"):
                await group.generate(PROMPTS[0], params(0))

    run(main)


@pytest.mark.slow
def test_a_request_that_outlives_too_many_engines_fails(cluster: Session, folder):
    async def main() -> None:
        async with RolloutGroup([config(folder)], EACH, failures=FailureConfig(max_failures=-1), attempts=2) as group:
            answer = asyncio.ensure_future(group.generate(PROMPTS[0], params(0, 200)))
            for _ in range(2):
                while not group.fleet.ready:
                    await asyncio.sleep(0.05)
                await asyncio.sleep(0)
                os.kill(group._started[0].pid, signal.SIGKILL)
                while group.fleet.ready and not answer.done():
                    await asyncio.sleep(0.05)
            with pytest.raises(RolloutError, match="its engines failed 2 times"):
                await answer

    run(main)


def test_an_engine_that_does_not_start_says_why_and_leaves_nothing(cluster: Session, tmp_path):
    folder = rollouts.save(tmp_path / "model")
    Path(folder, "broken").touch()

    async def main() -> None:
        group = RolloutGroup([config(folder)] * 2, EACH, start=rollouts.unstartable)
        with pytest.raises(ValueError, match="it does not want to"):
            await group.start()
        with pytest.raises(CapacityError, match="granted 0 of 1 engines their seats"):
            await RolloutGroup([config(folder)], {"CPU": 1000}, wait_s=0.5).start()

    run(main)
    with pytest.raises(ValueError, match="at least one engine"):
        RolloutGroup([])


def test_an_engine_that_is_killed_while_it_starts_is_started_again(cluster: Session, tmp_path, expected):
    folder = rollouts.save(tmp_path / "model")

    async def main() -> None:
        Path(folder, "perish-1").touch()
        async with RolloutGroup([config(folder)] * 2, EACH, start=rollouts.perishing) as group:
            assert group.fleet.failures == 1
            assert group.fleet.ready == (0, 1)
            assert await all_of(group) == expected
        Path(folder, "perish-2").touch()
        with pytest.raises(RolloutError, match="did not start"):
            await RolloutGroup([config(folder)], EACH, failures=FailureConfig(), start=rollouts.perishing).start()

    run(main)


def test_paused_engines_go_on_where_they_were(cluster: Session, folder, expected):
    async def main() -> None:
        async with RolloutGroup([config(folder)], EACH) as group:
            answers = asyncio.ensure_future(all_of(group))
            await asyncio.sleep(0)
            await group.pause()
            before = (await group.stats())[0].generated_tokens
            assert (await group.stats())[0].generated_tokens == before
            await group.resume()
            assert await answers == expected

    run(main)


@pytest.mark.slow
def test_engines_that_share_seats_keep_to_their_turns_whatever_dies(cluster: Session, folder, expected):
    async def main(trainer: ActorGroup) -> None:
        with pytest.raises(ValueError, match="cannot share the seats of 1"):
            RolloutGroup([config(folder)] * 2, beside=trainer.berths)
        failures = FailureConfig(max_failures=1)
        async with RolloutGroup([config(folder)], beside=trainer.berths, failures=failures) as group:
            assert group.node(0) == trainer.where[0].node
            await group.sleep()
            answers = asyncio.ensure_future(all_of(group))
            await asyncio.sleep(0)
            assert (await group.stats())[0].waiting == 0  # nothing has come
            os.kill(group._started[0].pid, signal.SIGKILL)
            while group.fleet.failures == 0:
                await asyncio.sleep(0.05)
            assert group.fleet.of(Health.STARTING) == (0,)
            assert not answers.done()
            await group.wake()
            assert await answers == expected
            under_way = asyncio.ensure_future(all_of(group))
            await asyncio.sleep(0)
            await group.sleep()
            before = (await group.stats())[0]
            assert (before.paused, before.kv_usage) == (True, 0.0)
            assert (await group.stats())[0] == before
            await group.wake()
            assert await under_way == expected

    with ActorGroup(Mesh(), {"CPU": 1.0}) as trainer:
        run(lambda: main(trainer))


def test_every_step_of_a_long_prefill_is_progress(folder):
    engine = NativeEngine(config(folder, max_batched_tokens=32))
    engine.add(Request("long", tuple(range(50)) * 4, params(0, 4)))
    progress, steps = Progress(), 0
    while engine.has_unfinished():
        assert progress.stuck_s(engine.stats(), float(steps)) == 0.0
        engine.step()
        steps += 1
    assert steps > 8
    engine.close()

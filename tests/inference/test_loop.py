"""The engine loop: everyone gets their own outputs, whoever leaves is forgotten, and nobody waits for a dead engine."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import pytest

from raytron.inference import EngineFailed, EngineLoop, Overloaded, Request, SamplingParams, WeightUpdateError
from tests.inference.counting import DEADLY, POISON, CountingEngine

FOREVER = 10**9


def request(id: str, last: int = 0, tokens: int = 5, n: int = 1) -> Request:
    return Request(id, (last,), SamplingParams(max_tokens=tokens, n=n))


async def collect(loop: EngineLoop, asked: Request) -> list[tuple[int, int, int]]:
    """(index, token, version) of everything that comes."""
    return [
        (output.index, token, version)
        async for outputs in loop.generate(asked)
        for output in outputs
        for token, version in zip(output.token_ids, output.versions, strict=True)
    ]


def run(engine: CountingEngine, body: Callable, **options) -> object:
    """`await body(loop)` with an engine loop that is closed afterwards."""
    loop = EngineLoop(engine, **options)
    try:
        return asyncio.run(asyncio.wait_for(body(loop), 60))
    finally:
        loop.close()
        assert engine.closed


def weights(tmp_path, name: str) -> str:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    return str(folder)


def test_every_request_gets_its_own_outputs_in_order():
    async def body(loop):
        asked = [request(str(i), last=100 * i, tokens=1 + i % 7, n=1 + i % 3) for i in range(200)]
        for one, got in zip(asked, await asyncio.gather(*(collect(loop, r) for r in asked)), strict=True):
            for index in range(one.params.n):
                first = one.prompt_token_ids[-1] + 1
                assert [t for i, t, _ in got if i == index] == list(range(first, first + one.params.max_tokens))
        assert (loop.waiting, loop.running) == (0, 0)

    run(CountingEngine(), body)


def test_a_late_reader_finds_what_has_gathered_in_one_list():
    async def body(loop):
        async with aclosing(loop.generate(request("a", tokens=50))) as outputs:
            first = await anext(outputs)
            while (await loop.stats()).running:
                pass
            rest = [some async for some in outputs]
            assert len(rest) <= 1
            assert len(first) + sum(map(len, rest)) == 50

    run(CountingEngine(), body)


def test_leaving_aborts_the_request_and_only_that():
    engine = CountingEngine()

    async def body(loop):
        stays = asyncio.ensure_future(collect(loop, request("stays", tokens=2000)))
        for i in range(50):
            async with aclosing(loop.generate(request(f"leaves {i}", tokens=FOREVER))) as outputs:
                await anext(outputs)
        reader = asyncio.ensure_future(collect(loop, request("is cancelled", tokens=FOREVER)))
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert len(await stays) == 2000
        assert (await loop.stats()).running == 0
        assert (loop.waiting, loop.running) == (0, 0)

    run(engine, body)


def test_the_queue_is_bounded_and_opens_again():
    async def body(loop):
        flood = [asyncio.ensure_future(collect(loop, request(str(i), tokens=3))) for i in range(100)]
        done = await asyncio.gather(*flood, return_exceptions=True)
        refused = [r for r in done if isinstance(r, Overloaded)]
        assert len(refused) == 90
        assert all(r.retry_after_s >= 1 for r in refused)
        assert sum(isinstance(r, list) and len(r) == 3 for r in done) == 10
        assert len(await collect(loop, request("later"))) == 5

    run(CountingEngine(), body, max_queue=10)


def test_a_bad_request_harms_nobody():
    async def body(loop):
        good = asyncio.ensure_future(collect(loop, request("good", tokens=500)))
        with pytest.raises(ValueError, match="poison"):
            await collect(loop, request("bad", last=POISON))
        with pytest.raises(ValueError, match="in use"):
            await collect(loop, request("good"))
        assert len(await good) == 500

    run(CountingEngine(), body)


def test_a_dead_engine_ends_all_requests_and_takes_none():
    async def body(loop):
        others = [asyncio.ensure_future(collect(loop, request(str(i), tokens=FOREVER))) for i in range(5)]
        while (await loop.stats()).running < 5:
            pass
        with pytest.raises(EngineFailed, match="the engine broke"):
            await collect(loop, request("deadly", last=DEADLY))
        for ended in await asyncio.gather(*others, return_exceptions=True):
            assert isinstance(ended, EngineFailed)
        with pytest.raises(EngineFailed, match="the engine broke"):
            await collect(loop, request("after"))
        with pytest.raises(EngineFailed):
            await loop.call(lambda engine: engine.version)
        assert "the engine broke" in loop.health
        assert (await loop.stats()).health == loop.health

    run(CountingEngine(), body)


def test_closing_ends_what_is_running():
    async def body(loop):
        running = asyncio.ensure_future(collect(loop, request("a", tokens=FOREVER)))
        while not loop.running:
            await asyncio.sleep(0)
        await asyncio.to_thread(loop.close)
        with pytest.raises(EngineFailed, match="closed"):
            await running

    run(CountingEngine(), body)


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_weights_change_under_running_requests(mode, tmp_path):
    async def body(loop):
        before = asyncio.ensure_future(collect(loop, request("before", tokens=30_000)))
        while not loop.running:
            await asyncio.sleep(0)
        update = asyncio.ensure_future(loop.update_weights(weights(tmp_path, "new"), mode))
        after = asyncio.ensure_future(collect(loop, request("after", tokens=5)))
        assert await update == 1 == loop.version
        versions = [version for *_, version in await before]
        assert versions == sorted(versions)
        expected = {"keep": {0, 1}, "wait": {0}, "abort": {0}}[mode]
        assert set(versions) == expected
        assert (len(versions) == 30_000) == (mode != "abort")
        assert all(version == 1 for *_, version in await after) or mode == "keep"

    run(CountingEngine(), body)


def test_after_a_failed_update_nothing_is_answered_until_one_succeeds(tmp_path):
    async def body(loop):
        running = asyncio.ensure_future(collect(loop, request("a", tokens=FOREVER)))
        while not loop.running:
            await asyncio.sleep(0)
        with pytest.raises(ValueError, match=r"no model\.safetensors"):
            await loop.update_weights(str(tmp_path / "nothing"))
        with pytest.raises(WeightUpdateError, match="another model"):
            await loop.update_weights(weights(tmp_path, "other"))
        assert not running.done()
        assert loop.health == "ready"
        with pytest.raises(WeightUpdateError, match="do not fit"):
            await loop.update_weights(weights(tmp_path, "bad"))
        with pytest.raises(EngineFailed, match="stale"):
            await running
        with pytest.raises(EngineFailed, match="stale"):
            await collect(loop, request("b"))
        assert "stale" in (await loop.stats()).health
        assert await loop.update_weights(weights(tmp_path, "good"), version=7) == 7
        assert [version for *_, version in await collect(loop, request("c"))] == [7] * 5

    run(CountingEngine(), body)


def test_draining_finishes_what_is_in_and_takes_nothing_new():
    async def body(loop):
        inside = asyncio.ensure_future(collect(loop, request("a", tokens=1000)))
        while not loop.running:
            await asyncio.sleep(0)
        draining = asyncio.ensure_future(loop.drain())
        await asyncio.sleep(0)
        with pytest.raises(EngineFailed, match="draining"):
            await collect(loop, request("b"))
        await draining
        assert inside.done() or len(await inside) == 1000

    run(CountingEngine(), body)


def test_a_paused_engine_sleeps_and_goes_on():
    async def body(loop):
        await loop.call(lambda engine: engine.pause())
        waiting = asyncio.ensure_future(collect(loop, request("a")))
        assert (await loop.stats()).paused
        assert not waiting.done()
        await loop.call(lambda engine: engine.resume())
        assert len(await waiting) == 5

    run(CountingEngine(), body)


def test_several_event_loops_share_an_engine():
    loop = EngineLoop(CountingEngine())
    try:

        def ask(id: str) -> int:
            return len(asyncio.run(collect(loop, request(id, tokens=300))))

        async def main() -> list[int]:
            return await asyncio.gather(*(asyncio.to_thread(ask, str(i)) for i in range(4)))

        assert asyncio.run(main()) == [300] * 4
    finally:
        loop.close()

"""The application on a live Ray Serve: engines that die, clients that leave, weights that change, replicas that go."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from raytron.actors import Session
from raytron.config import EngineConfig, ReplicaConfig, ServeConfig
from raytron.serving.app import App, ServedModel, build, run
from tests.inference.counting import CountingEngine
from tests.serving.clients import Flood, ask, body, idle, memory_mb, pids, stats, until
from tests.serving.conftest import save_model


def served(path: str, name: str, replicas: tuple[int, int] = (1, 1), **engine) -> ServedModel:
    engine = {"dtype": "fp32", "max_num_seqs": 32, "kv_cache_mb": 8.0, "threads": 1, **engine}
    scaling = ReplicaConfig(
        *replicas, target_requests=4, upscale_delay_s=0.2, downscale_delay_s=1.0, resources={"CPU": 1.0}
    )
    return ServedModel(name, EngineConfig(path=path, **engine), scaling)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    """Six models of one shape, each with weights of its own."""
    folder = tmp_path_factory.mktemp("models")
    return [save_model(folder / str(seed), seed) for seed in range(6)]


@pytest.fixture(scope="module")
def ray() -> Iterator[Session]:
    os.environ.pop("RAY_ADDRESS", None)
    folder = tempfile.mkdtemp(prefix="rt-", dir="/tmp")  # pytest's own folders are too deep for sockets
    with Session(12, temp_dir=folder) as session:
        yield session
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def app(ray, paths) -> Iterator[App]:
    """Two replicas of one model, and a second model."""
    models = [served(paths[0], "tiny", (2, 2)), served(paths[1], "other")]
    with run(models, ServeConfig(port=0, max_queue=1000), session=ray) as app:
        yield app


def test_several_models_answer_by_name(app, paths):
    assert [m["id"] for m in httpx.get(f"{app.url}/v1/models").json()["data"]] == ["tiny", "other"]
    texts = {name: ask(app, name, "once").json()["choices"][0]["text"] for name in app.names}
    assert texts["tiny"] != texts["other"]
    assert ask(app, "nobody").status_code == 404
    assert ask(app, "tiny", tokens=1000).status_code == 400
    assert httpx.get(f"{app.url}/health").json() == {"status": "ok"}


def test_replicas_share_the_work_and_a_prompts_beginning_is_computed_once(app):
    prompts = [f"conversation number {i}, which begins like no other one: " for i in range(8)]
    for turn in range(3):
        answers = asyncio.run(Flood(app).send([body("tiny", p + "and on it goes. " * turn) for p in prompts]))
        assert [status for status, _, _ in answers] == [200] * 8
        cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for _, _, a in answers]
        assert min(cached) >= (32 if turn else 0), "one block of 32 bytes at least is where the last turn was answered"
    assert all(s["finished"] for s in stats(app, "tiny"))


def test_a_storm_of_clients_that_leave_frees_every_block(app):
    async def storm() -> None:
        async def come_and_go(i: int) -> None:
            reader, writer = await Flood(app).open(body("tiny", [i % 200 + 1] * 64, 400, stream=i % 2 == 0))
            if i % 3:  # the others leave before a word is said
                await asyncio.wait_for(reader.read(10 if i % 2 == 0 else 0), 60)
            writer.transport.abort()

        await asyncio.gather(*(come_and_go(i) for i in range(500)))

    before = sum(s["finished"] for s in stats(app, "tiny"))
    asyncio.run(storm())
    until(lambda: idle(app, "tiny"), "all blocks free")
    assert sum(s["finished"] for s in stats(app, "tiny")) - before < 500, "most were not computed to their end"
    assert ask(app, "tiny").status_code == 200


def test_weights_change_under_requests_and_none_is_lost(app, paths):
    first = stats(app, "tiny")[0]["version"]

    async def swapping() -> list:
        async with httpx.AsyncClient(base_url=app.url, timeout=60) as client:
            asking = asyncio.create_task(
                Flood(app).send([body("tiny", f"request {i}", 40, logprobs=1) for i in range(200)], at_once=24)
            )
            for path in (*paths[1:5], paths[0]):
                await asyncio.sleep(0)
                answer = await client.post("/admin/weights", json={"model": "tiny", "path": path})
                assert answer.status_code == 200, answer.text
            return await asking

    answers = asyncio.run(swapping())
    assert [status for status, _, _ in answers] == [200] * 200
    assert all(a["usage"]["completion_tokens"] == 40 for _, _, a in answers)
    assert [s["version"] for s in stats(app, "tiny")] == [first + 5] * 2
    after = ask(app, "tiny")
    assert int(after.headers["x-raytron-weight-version"]) == first + 5
    assert {int(h["x-raytron-weight-version"]) for _, h, _ in answers} <= set(range(first, first + 6))


def test_weights_that_do_not_fit_are_refused_and_cost_nothing(app, paths, tmp_path):
    before = ask(app, "tiny").json()["choices"][0]["text"]
    version = stats(app, "tiny")[0]["version"]
    for path, status in ((tmp_path / "nothing", 400), (_broken(paths[0], tmp_path / "broken"), 400)):
        answer = httpx.post(f"{app.url}/admin/weights", json={"model": "tiny", "path": str(path)}, timeout=60)
        assert answer.status_code == status, answer.text
    until(lambda: [s["version"] for s in stats(app, "tiny")] == [version] * 2, "both as they were")
    assert ask(app, "tiny").json()["choices"][0]["text"] == before


def _broken(path: str, to: Path) -> Path:
    """A model of another shape: its file is there, its tensors do not fit."""
    from raytron.checkpoint import save_pretrained
    from raytron.models import build as build_model
    from raytron.models.arch import DecoderConfig
    from tests.serving.conftest import SHAPE

    save_pretrained(build_model(DecoderConfig(**SHAPE | {"intermediate_size": 96})), to)
    return to


def test_a_killed_engine_loses_no_whole_answer_and_comes_back_with_the_newest_weights(app, paths, tmp_path):
    """Out of the other engine's memory: they are on disk no more."""
    newest = shutil.copytree(paths[2], tmp_path / "newest")
    answer = httpx.post(f"{app.url}/admin/weights", json={"model": "tiny", "path": str(newest)}, timeout=60)
    version = answer.json()["version"]
    until(lambda: {s["version"] for s in stats(app, "tiny")} == {version}, "both have them")
    shutil.rmtree(newest)
    asked = [body("tiny", f"after {i}", 16) for i in range(16)]
    texts = [a["choices"][0]["text"] for _, _, a in asyncio.run(Flood(app).send(asked))]
    victim, survivor = pids("engine-0-tiny")

    async def scenario() -> list:
        load = asyncio.create_task(Flood(app).send([body("tiny", f"load {i}", 400) for i in range(200)], at_once=32))
        await asyncio.to_thread(until, lambda: all(s["running"] for s in stats(app, "tiny")), "both are at work", 20.0)
        os.kill(victim, signal.SIGKILL)
        return await load

    answers = asyncio.run(scenario())
    assert [status for status, _, _ in answers] == [200] * 200
    assert all(a["usage"]["completion_tokens"] == 400 for _, _, a in answers)
    until(lambda: len(stats(app, "tiny")) == 2 and victim not in pids("engine-0-tiny"), "a new replica")
    until(lambda: {s["version"] for s in stats(app, "tiny")} == {version}, "its weights are the newest")
    assert survivor in pids("engine-0-tiny")

    def both_answer() -> bool:
        """Serve passes a replica over whose first word of its queue takes long; ours just came up."""
        answers = asyncio.run(Flood(app).send(asked))
        assert [a["choices"][0]["text"] for _, _, a in answers] == texts
        return all(s["finished"] for s in stats(app, "tiny"))

    until(both_answer, "both have answered")
    assert ask(app, "other").status_code == 200


def test_too_many_requests_are_refused_keys_are_asked_for_and_nothing_grows(ray, paths):
    model = served(paths[0], "slow", max_num_seqs=1)
    config = ServeConfig(port=0, max_queue=8, api_keys=("secret",), admin_key="chief")
    with run([model], config, name="small", session=ray, start=one_at_a_time) as app:
        assert ask(app, "slow").status_code == 401
        assert httpx.get(f"{app.url}/health").status_code == 200
        (pid,) = pids("small#engine-0-slow")
        (door,) = pids("small#ingress")
        flood = [body("slow", "x" * 200, 400) for _ in range(300)]
        asyncio.run(Flood(app, "secret").send(flood, at_once=300))
        before = memory_mb(pid), memory_mb(door)
        for _ in range(2):
            answers = asyncio.run(Flood(app, "secret").send(flood, at_once=300))
            refused = [headers for status, headers, _ in answers if status == 429]
            assert len(refused) > 30
            assert all(int(headers["retry-after"]) >= 1 for headers in refused)
            assert {status for status, _, _ in answers} == {200, 429}
        assert memory_mb(pid) < before[0] + 30
        assert memory_mb(door) < before[1] + 30
        assert stats(app, "slow", "chief")[0]["running"] == 0


def one_at_a_time(config: EngineConfig, each: object) -> CountingEngine:
    return CountingEngine(limit=1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}])
def test_a_replica_of_two_ranks_answers_like_one_and_is_replaced_when_a_rank_dies(ray, app, paths, layout):
    model = served(paths[1], "wide", **layout)
    with run([model], ServeConfig(port=0), name="wide", session=ray) as wide:
        prompts = ["once upon a time", "hello", "x" * 100]
        expected = [ask(app, "other", prompt, 24).json()["choices"][0]["text"] for prompt in prompts]
        assert [ask(wide, "wide", prompt, 24).json()["choices"][0]["text"] for prompt in prompts] == expected
        (rank,) = pids("Worker")
        os.kill(rank, signal.SIGKILL)
        until(lambda: rank not in pids("Worker") and pids("Worker"), "a new rank")
        assert ask(wide, "wide", prompts[0], 24).json()["choices"][0]["text"] == expected[0]
        swapped = httpx.post(f"{wide.url}/admin/weights", json={"model": "wide", "path": paths[0]}, timeout=60)
        assert swapped.status_code == 200
        assert ask(wide, "wide", prompts[0], 24).json()["choices"][0]["text"] != expected[0]
    until(lambda: not pids("Worker"), "no rank left")


@pytest.mark.slow
def test_a_model_grows_from_nothing_and_shrinks_to_nothing_under_requests(ray, paths):
    model = served(paths[0], "tide", (0, 2))
    with run([model], ServeConfig(port=0), name="tide", session=ray) as app:
        assert stats(app, "tide") == []
        assert httpx.get(f"{app.url}/health").status_code == 200
        version = httpx.post(f"{app.url}/admin/weights", json={"model": "tide", "path": paths[3]}, timeout=60).json()
        first = ask(app, "tide")  # waits for the replica that it brings about
        assert first.status_code == 200
        assert int(first.headers["x-raytron-weight-version"]) == version["version"]

        async def flood() -> list:
            load = asyncio.create_task(
                Flood(app).send([body("tide", f"wave {i}", 400) for i in range(400)], at_once=64)
            )
            await asyncio.to_thread(until, lambda: len(stats(app, "tide")) == 2, "a second replica")
            return await load

        assert {status for status, _, _ in asyncio.run(flood())} == {200}
        while len(stats(app, "tide")) == 2:  # too few requests for two engines: one leaves, and finishes what it has
            few = asyncio.run(Flood(app).send([body("tide", f"ripple {i}", 400) for i in range(3)]))
            assert [(status, a["usage"]["completion_tokens"]) for status, _, a in few] == [(200, 400)] * 3
        until(lambda: stats(app, "tide") == [], "no replica")
        until(lambda: not pids("tide#engine"), "no process left")


@pytest.mark.parametrize("bad", ["none", "twice", "nowhere", "layout"])
def test_what_cannot_be_served_is_said_before_anything_starts(paths, bad, tmp_path):
    model = served(paths[0], "tiny")
    uncut = replace(model, engine=replace(model.engine, tp=3))
    models = {"none": [], "twice": [model, model], "nowhere": [served(str(tmp_path), "gone")], "layout": [uncut]}[bad]
    with pytest.raises(ValueError, match=r"at least one|no model|parallel\.tp 3"):
        build(models)

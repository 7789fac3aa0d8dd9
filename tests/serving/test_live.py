"""A live server while things happen to it: clients leave, weights change, the engine dies."""

import asyncio
import json

import httpx
import pytest

from raytron.config import ServeConfig
from raytron.inference import LLM, SamplingParams
from tests.serving.conftest import save_model, serving

LONG = {"model": "tiny", "prompt": "x", "max_tokens": 500, "ignore_eos": True}


def stats(server) -> dict:
    return httpx.get(f"{server.url}/admin/stats").json()["models"]["tiny"][0]


def all_is_free(server) -> bool:
    found = stats(server)
    return found["running"] == found["waiting"] == 0 and found["kv_usage"] == 0 and server.loop.waiting == 0


def wait_until_free(server) -> None:
    """Each look waits for a step of the engine; a thousand are many more than an abort needs."""
    for _ in range(1000):
        if all_is_free(server):
            return
    raise AssertionError(stats(server))


async def leave_after(http: httpx.AsyncClient, url: str, body: dict, events: int) -> None:
    """Ask, read so many events, and hang up."""
    async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
        seen = 0
        async for line in answer.aiter_lines():
            seen += line.startswith("data: ")
            if seen >= events:
                return


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(model_path, stream):
    with serving(model_path, max_model_len=512) as server:

        async def leave() -> None:
            async with httpx.AsyncClient(timeout=60) as http:
                if stream:
                    await leave_after(http, server.url, {**LONG, "stream": True}, 3)
                else:
                    asking = asyncio.ensure_future(http.post(f"{server.url}/v1/completions", json=LONG))
                    while not server.loop.running:
                        await asyncio.sleep(0.001)
                    asking.cancel()
                    await asyncio.gather(asking, return_exceptions=True)

        asyncio.run(leave())
        wait_until_free(server)
        assert stats(server)["generated_tokens"] < 500
        page = httpx.get(f"{server.url}/metrics").text
        assert 'raytron_requests_total{model="tiny",path="/v1/completions",status="abandoned"} 1.0' in page


@pytest.mark.slow
def test_a_storm_of_500_clients_that_leave(model_path):
    with serving(model_path, ServeConfig(port=0, max_queue=1000)) as server:

        async def one(http: httpx.AsyncClient, i: int) -> None:
            body = {**LONG, "stream": i % 3 > 0, "n": 1 + i % 2}
            try:
                async with asyncio.timeout(0.2 + i % 7):
                    await leave_after(http, server.url, body, 1 + i % 5)
            except TimeoutError:
                pass

        async def storm() -> None:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(timeout=120, limits=limits) as http:
                await asyncio.gather(*(one(http, i) for i in range(500)))

        asyncio.run(storm())
        wait_until_free(server)
        answer = httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 5}, timeout=60)
        assert answer.status_code == 200


@pytest.mark.slow
def test_200_requests_across_5_swaps_none_lost(model_path, tmp_path):
    """Tokens of a request follow the weights their version names, whichever were in force when it began."""
    paths = [model_path] + [save_model(tmp_path / str(seed), seed) for seed in range(1, 6)]
    with serving(model_path, ServeConfig(port=0, max_queue=1000)) as server:
        some_at_a_time = asyncio.Semaphore(24)

        async def ask(http: httpx.AsyncClient, i: int) -> dict:
            body = {"model": "tiny", "prompt": f"request {i}", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
            body |= {"return_token_ids": True, "return_weight_versions": True}
            async with some_at_a_time:
                answer = await http.post(f"{server.url}/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        async def everything() -> list[dict]:
            async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as http:
                asking = [asyncio.ensure_future(ask(http, i)) for i in range(200)]
                for version in range(1, 6):
                    done = 30 * version
                    while sum(task.done() for task in asking) < done:
                        await asyncio.wait([t for t in asking if not t.done()], return_when=asyncio.FIRST_COMPLETED)
                    change = {"path": paths[version], "mode": "keep"}
                    told = await http.post(f"{server.url}/admin/weights", json=change)
                    assert told.json()["version"] == version
                return await asyncio.gather(*asking)

        answers = asyncio.run(everything())
    spans = [answer["choices"][0]["weight_versions"] for answer in answers]
    assert all(sum(span["tokens"] for span in one) == 60 for one in spans)
    assert all([s["version"] for s in one] == sorted({s["version"] for s in one}) for one in spans)
    assert {span["version"] for one in spans for span in one} == set(range(6))
    assert any(len(one) > 1 for one in spans)
    check_versions(paths, answers)


def check_versions(paths: list[str], answers: list[dict]) -> None:
    """Each version's tokens are the likeliest of that version's weights after what stands before them."""
    for version, path in enumerate(paths):
        llm = LLM(path, dtype="fp32", kv_cache_mb=8.0, threads=1)
        for i, answer in enumerate(answers):
            choice, at = answer["choices"][0], 0
            for span in choice["weight_versions"]:
                if span["version"] == version:
                    before = [*f"request {i}".encode(), *choice["token_ids"][:at]]
                    params = SamplingParams(temperature=0, max_tokens=span["tokens"], ignore_eos=True)
                    again = llm.generate([before], params)[0].outputs[0]
                    assert again.token_ids == choice["token_ids"][at : at + span["tokens"]]
                at += span["tokens"]
        llm.close()


def test_new_weights_are_visible_and_wrong_ones_change_nothing(model_path, tmp_path):
    other = save_model(tmp_path / "other", seed=9)
    with serving(model_path) as server:
        ask = {"model": "tiny", "prompt": "hello", "max_tokens": 10, "temperature": 0}

        def say() -> tuple[str, str, int]:
            answer = httpx.post(f"{server.url}/v1/completions", json=ask)
            body = answer.json()
            return answer.headers["x-raytron-weight-version"], body["choices"][0]["text"], body["weight_version"]

        old = say()
        assert (old[0], old[2]) == ("0", 0)
        for path in (str(tmp_path), "/nowhere", "relative"):
            refused = httpx.post(f"{server.url}/admin/weights", json={"path": path})
            assert refused.status_code == 400
            assert "model.safetensors" in refused.json()["error"]["message"]
        assert httpx.post(f"{server.url}/admin/weights", json={"path": other, "mode": "now"}).status_code == 400
        assert httpx.post(f"{server.url}/admin/weights", json={"path": other, "model": "x"}).status_code == 404
        assert say() == old
        told = httpx.post(f"{server.url}/admin/weights", json={"path": other, "version": 41}).json()
        assert told["version"] == 41
        new = say()
        assert (new[0], new[2]) == ("41", 41)
        assert new[1] != old[1]
        assert httpx.get(f"{server.url}/v1/models/tiny").json()["weight_version"] == 41
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**ask, "stream": True}) as answer:
            assert answer.headers["x-raytron-weight-version"] == "41"
            events = [line for line in answer.iter_lines() if line.startswith("data: {")]
        assert all(json.loads(event[6:])["weight_version"] == 41 for event in events)


def test_damaged_weights_do_not_end_the_server(model_path, tmp_path):
    damaged = save_model(tmp_path / "damaged", seed=3)
    file = tmp_path / "damaged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with serving(model_path) as server:
        ask = {"model": "tiny", "prompt": "hello", "max_tokens": 10, "temperature": 0}
        refused = httpx.post(f"{server.url}/admin/weights", json={"path": damaged})
        assert 400 <= refused.status_code < 500, refused.text
        assert httpx.post(f"{server.url}/v1/completions", json=ask).status_code == 503  # half of them may be new
        told = httpx.post(f"{server.url}/admin/weights", json={"path": model_path})
        assert told.status_code == 200, told.text
        assert httpx.post(f"{server.url}/v1/completions", json=ask).status_code == 200


def test_an_engine_that_dies_is_reported(model_path):
    with serving(model_path) as server:

        async def ask_and_kill() -> str:
            async with httpx.AsyncClient(timeout=60) as http:
                body = {**LONG, "stream": True}
                async with http.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
                    assert answer.status_code == 200
                    lines = answer.aiter_lines()
                    await anext(lines)

                    def broken() -> None:
                        raise RuntimeError("the engine broke")

                    await asyncio.wrap_future(
                        asyncio.run_coroutine_threadsafe(break_step(broken), asyncio.get_running_loop())
                    )
                    return "\n".join([line async for line in lines])

        async def break_step(broken) -> None:
            await server.loop.call(lambda engine: setattr(engine, "step", broken))

        rest = asyncio.run(ask_and_kill())
        events = [json.loads(line[6:]) for line in rest.splitlines() if line.startswith("data: {")]
        assert "the engine broke" in events[-1]["error"]["message"]
        refused = httpx.post(f"{server.url}/v1/completions", json=LONG)
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "server_error"
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert httpx.get(f"{server.url}/metrics").status_code == 200


def test_the_server_finishes_what_it_began(model_path):
    with serving(model_path) as server:

        async def ask(http: httpx.AsyncClient) -> dict:
            return (await http.post(f"{server.url}/v1/completions", json=LONG)).json()

        async def drain() -> dict:
            async with httpx.AsyncClient(timeout=60) as http:
                asking = asyncio.ensure_future(ask(http))
                while not server.loop.running:
                    await asyncio.sleep(0.001)
                await server.loop.drain()
                assert (await http.post(f"{server.url}/v1/completions", json=LONG)).status_code == 503
                return await asking

        assert asyncio.run(drain())["usage"]["completion_tokens"] == 500

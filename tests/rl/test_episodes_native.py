"""Episodes against the native engine: a random model's play is recorded as the engine gave it, ends where the task
says, and depends on its seeds alone, not on what else the engine was computing.

The model's own files name another end token than the tasks do, which must not matter.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial

import numpy as np
import pytest

from raytron.config import EngineConfig
from raytron.inference import Collector, EngineLoop, NativeEngine, Request, SamplingParams
from raytron.rl.config import TaskConfig
from raytron.rl.episodes import run_group
from raytron.rl.tasks import TASKS, build
from tests.inference.models import SIZES
from tests.models.hugging_face import random_model

TINY = {**SIZES, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


async def generate(loop: EngineLoop, token_ids, params):
    """One answer of an engine."""
    collector, request = Collector(), Request(str(params.seed), token_ids, params)
    collector.expect(request)
    async for outputs in loop.generate(request):
        for output in outputs:
            collector.put(output)
    return collector.generations[request.id].outputs[0]


@pytest.fixture(scope="module", params=[name for name in TASKS if name != "gsm8k"])
def played(request, tmp_path_factory):
    """(task, groups played one after the other, the same groups all at once)."""
    task, folder = build(TaskConfig(request.param), seed=1), tmp_path_factory.mktemp("model")
    random_model({**TINY, "vocab_size": task.vocab_size}, seed=0).save_pretrained(folder)
    task.save_tokenizer(folder)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] not in task.eos_token_ids
    loop = EngineLoop(NativeEngine(EngineConfig(path=str(folder), reproducible=True, kv_cache_mb=8.0, threads=1)))
    play = partial(
        run_group, partial(generate, loop), task, sampling=SamplingParams(temperature=1.0), samples=4, seed=9
    )

    async def scenario():
        prompts = [task.prompt(index) for index in range(3)]
        alone = [await play(prompt) for prompt in prompts]
        return alone, await asyncio.gather(*map(play, prompts))

    try:
        return task, *asyncio.run(scenario())
    finally:
        loop.close()


def test_play_depends_on_seeds_alone(played):
    _, alone, together = played
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one.trajectories, other.trajectories, strict=True):
            for name in ("tokens", "chosen", "logprobs", "versions"):
                assert (getattr(a, name) == getattr(b, name)).all(), name
            assert (a.reward, a.truncated) == (b.reward, b.truncated)


def test_play_is_recorded_whole(played):
    task, groups, _ = played
    trajectories = [t for group in groups for t in group.trajectories]
    assert len({tuple(t.tokens.tolist()) for t in trajectories}) > 1
    ends = {*task.eos_token_ids, *task.stop_token_ids}
    for t in trajectories:
        assert t.reward is not None, t.info
        assert (t.logprobs[t.chosen] < 0).all()
        assert (t.versions[t.chosen] == 0).all()
        if not t.truncated:
            assert int(t.tokens[np.flatnonzero(t.chosen)[-1]]) in ends
    for group in groups:
        prompt = task.prompt(group.index).token_ids
        assert all(tuple(t.tokens[: len(prompt)].tolist()) == prompt for t in group.trajectories)

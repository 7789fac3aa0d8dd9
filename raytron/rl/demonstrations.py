"""What a task's own right answers look like as episodes: examples for a warm start by supervised fine-tuning.

An episode is played like any other, with the task's solution in the engine's place, so that what the environment says
between turns stands where it will stand in training, and is as little learnt from.

    write_demonstrations(task, "runs/warm", 2000)
    sft.run(SFTConfig(data=SFTDataConfig(path="runs/warm/demonstrations.jsonl", tokenizer="runs/warm"), ...))
    rl.run(RLConfig(model=ModelConfig(path=".../model"), task=..., ...))
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

from raytron.inference.types import SamplingParams
from raytron.rl.environments import Generated, Prompt, Task
from raytron.rl.episodes import run_episode
from raytron.rl.types import Trajectory

__all__ = ["demonstrations", "write_demonstrations"]


def demonstrations(task: Task, count: int, first: int = 0) -> Iterator[Trajectory]:
    """The episodes of prompts `first` .. `first + count` of the run, rightly answered.

    Raises ValueError where the task knows no right answers, or its environment does not judge them.
    """
    for index in range(first, first + count):
        episode = asyncio.run(_played(task, task.prompt(index)))
        if episode.reward is None:
            raise ValueError(f"the task's own answer to its prompt {index} was not judged: {episode.info['error']}")
        yield episode


async def _played(task: Task, prompt: Prompt) -> Trajectory:
    if prompt.solution is None:
        raise ValueError(
            f"{type(task).__name__} gives no `solution` with its prompts, so there is nothing to demonstrate; write "
            "right answers yourself, or start without"
        )
    turns = iter(prompt.solution)

    async def generate(context: tuple[int, ...], params: SamplingParams) -> Generated:
        ids = next(turns, None)
        if ids is None:
            raise ValueError(f"the solution of prompt {prompt.index} has fewer turns than its episode")
        return Generated(ids, (0.0,) * len(ids), (0,) * len(ids))

    return await run_episode(generate, task, prompt)


def write_demonstrations(task: Task, folder: str | os.PathLike[str], count: int, first: int = 0) -> Path:
    """Write demonstrations as `demonstrations.jsonl` in `folder`, and the task's tokenizer beside it.

    Returns the file: what `SFTDataConfig.path` takes, with `folder` as its tokenizer. Errors as in `demonstrations`.
    """
    path = Path(folder) / "demonstrations.jsonl"
    task.save_tokenizer(folder)
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        for episode in demonstrations(task, count, first):
            tokens = episode.tokens.tolist()
            line = {"tokens": tokens, "chosen": episode.chosen.astype(int).tolist(), "text": task.decode(tokens, True)}
            file.write(json.dumps(line) + "\n")
    partial.replace(path)
    return path

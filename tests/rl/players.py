"""Engines for tests of episodes: a function from the context to an answer stands where a model would."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from raytron.inference.types import SamplingParams
from raytron.rl.environments import Generated, Prompt, Task
from raytron.rl.episodes import run_episode
from raytron.rl.types import Trajectory

Player = Callable[[tuple[int, ...]], Sequence[int]]


@dataclass
class Engine:
    """`generate` that plays `player`'s tokens, ended as a real engine ends them, and remembers what it was asked.

    Log-probability of the i-th token it ever chose: -i - 1; version: the turn.
    """

    player: Player
    asked: list[tuple[tuple[int, ...], SamplingParams]] = field(default_factory=list)
    answers: list[Generated] = field(default_factory=list)
    chosen: int = 0

    async def __call__(self, token_ids: tuple[int, ...], params: SamplingParams) -> Generated:
        await asyncio.sleep(0)
        self.asked.append((token_ids, params))
        wanted = list(self.player(token_ids))
        ends = [i for i, token in enumerate(wanted) if token in params.stop_token_ids]
        whole = wanted[: ends[0] + 1] if ends else wanted
        ids = tuple(whole[: params.max_tokens])
        reason = "stop" if ends and len(whole) <= params.max_tokens else "length"
        logprobs = tuple(-float(self.chosen + i + 1) for i in range(len(ids)))
        self.chosen += len(ids)
        self.answers.append(Generated(ids, logprobs, (len(self.answers),) * len(ids), reason))
        return self.answers[-1]


def play(task: Task, prompt: Prompt, player: Player, **options) -> Trajectory:
    """One episode of a player."""
    return asyncio.run(run_episode(Engine(player), task, prompt, **options))

"""What rollout tests run in actors: a trainer of one model, and engines that misbehave when told to."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import ray

from raytron.actors.replica import start_engine
from raytron.checkpoint import save_pretrained
from raytron.checkpoint.publisher import Publisher
from raytron.config import EngineConfig
from raytron.inference import Engine, NativeEngine, Pushed
from raytron.models import build
from raytron.models.arch import DecoderConfig
from raytron.parallel import World

ARCH = DecoderConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
)  # fmt: skip
CONFIG = {"kv_cache_mb": 4, "threads": 1, "dtype": "fp32", "max_num_seqs": 16, "logprobs": "processed"}
HALT = 5


def save(folder: Path, seed: int = 0) -> str:
    """A directory with the model's weights of a seed."""
    save_pretrained(build(ARCH, seed=seed), folder)
    return str(folder)


class Trains:
    """A trainer's rank: `train` makes other weights of it."""

    def __init__(self, world: World) -> None:
        self.model = build(ARCH, world)
        self.publisher = Publisher(self.model)

    def train(self, seed: int) -> None:
        self.model.initialize(seed)

    def nudge(self, factor: float) -> None:
        """Change a few elements."""
        self.model.weights[:5] *= factor

    def connect_publisher(self, *args: object) -> Mapping:
        return self.publisher.connect(*args)

    def publish(self, turn: int, delta: bool) -> object:
        return self.publisher.publish(turn, delta)

    def outgoing(self, node: str, message: int, delta: bool) -> np.ndarray:
        return self.publisher.outgoing(node, message, delta)


class Dying(Trains):
    """Is killed when half of the second push is there."""

    def publish(self, turn: int, delta: bool) -> object:
        if turn == 2:
            progress = self.publisher._shared.progress
            writing = progress.writing
            progress.writing = lambda writer, turn, limit: writing(writer, turn, limit // 2)
            progress.seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return super().publish(turn, delta)


class Skipping(NativeEngine):
    """Says that it has taken version 2, and has not."""

    def update_weights(self, weights: object) -> None:
        take = self.runner.take
        if isinstance(weights, Pushed) and weights.turn == 2:
            self.runner.take = lambda path, _: take(path, None)  # copies nothing, and sums up what it holds
        super().update_weights(weights)


class Pretending(NativeEngine):
    """Takes version 2 without looking at it."""

    def update_weights(self, weights: object) -> None:
        if not isinstance(weights, Pushed) or weights.turn != 2:
            super().update_weights(weights)


class Behind(NativeEngine):
    """Stays at version 1, and otherwise does as it is told."""

    def finish_weight_update(self, version: int) -> None:
        super().finish_weight_update(min(version, 1))


class Halting(NativeEngine):
    """Stops, until it is told to go on, when it has generated so many tokens."""

    halted = False

    def step(self) -> list:
        outputs = super().step()
        if self.stats().generated_tokens >= HALT and not self.halted:
            self.halted = True
            self.pause()
        return outputs


class Hanging(NativeEngine):
    """Comes to a halt in the way that a file of the model's folder names, which it takes away: the next goes on."""

    def step(self) -> list:
        file = Path(self.config.path, "hang")
        if not file.exists():
            return super().step()
        how = file.read_text()
        if how == "spin":
            return []
        file.unlink()
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        threading.Event().wait()
        return []


def skipping(config: EngineConfig, each: Mapping[str, float]) -> Engine:
    return Skipping(config)


def pretending(config: EngineConfig, each: Mapping[str, float]) -> Engine:
    return Pretending(config)


def behind(config: EngineConfig, each: Mapping[str, float]) -> Engine:
    return Behind(config)


def unstartable(config: EngineConfig, each: Mapping[str, float]) -> Engine:
    if Path(config.path, "broken").exists():
        raise ValueError("it does not want to")
    return start_engine(config, each)


def perishing(config: EngineConfig, each: Mapping[str, float]) -> Engine:
    """Is killed while it starts, once for each file "perish-..." in the model's folder."""
    for file in Path(config.path).glob("perish-*"):
        with suppress(FileNotFoundError):  # another engine has died of it
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
    return start_engine(config, each)


def halting(config: EngineConfig, each: Mapping[str, float]) -> Engine:
    return Halting(config)


def hanging(config: EngineConfig, each: Mapping[str, float]) -> Engine:
    return Hanging(config)


def telling(config: EngineConfig, each: Mapping[str, float]) -> Engine:
    """Leaves the process id of its second rank in the model's folder."""
    engine = start_engine(config, each)
    where = ray.get(engine._followers._workers[0].where.remote())
    Path(config.path, "second").write_text(str(where.pid))
    return engine

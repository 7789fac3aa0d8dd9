"""Guarding the numbers: when to skip a step, when to stop, and what went bad first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raytron.config import GuardConfig
from raytron.models.base import ShardedModel
from raytron.parallel.collectives import World

if TYPE_CHECKING:
    from raytron.training.engine import Record

__all__ = ["Culprit", "Guard", "TrainingStopped", "find_culprit"]

NORM_MEMORY = 0.95  # the running mean of gradient norms forgets over about 20 steps
WARM_STEPS = 20  # norms seen before a spike can be told from noise


class TrainingStopped(RuntimeError):  # noqa: N818 - an outcome, not a malfunction of the code
    """Too many steps in a row were skipped."""


class Guard:
    """Decides from replicated numbers only, so every rank decides the same."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config

    def judge(self, loss: float, norm: float, record: Record) -> str | None:
        """Why to skip a step: "non-finite", "spike", or None."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "non-finite"
        factor = self.config.spike_factor
        if factor is not None and record.updates >= WARM_STEPS and norm > factor * record.norm_mean:
            return "spike"
        return None

    def count(self, record: Record, skip: str | None, norm: float) -> None:
        """Note the decision in the record."""
        if skip is None:
            record.updates += 1
            record.consecutive_skips = 0
            memory = NORM_MEMORY if record.updates > 1 else 0.0
            record.norm_mean = memory * record.norm_mean + (1 - memory) * norm
            return
        record.skipped += 1
        record.consecutive_skips += 1
        record.nan_steps += skip == "non-finite"

    def check(self, record: Record, culprit: str | None) -> None:
        """TrainingStopped after `max_consecutive_skips`."""
        if record.consecutive_skips >= self.config.max_consecutive_skips:
            first = f"; first bad value: {culprit}" if culprit else ""
            raise TrainingStopped(
                f"{record.consecutive_skips} steps in a row were skipped, the last is step {record.step}{first}. The "
                "weights are those of the last good step: lower optimizer.lr, look at the data of these steps, or "
                "raise guard.max_consecutive_skips"
            )


@dataclass(frozen=True)
class Culprit:
    """The first non-finite tensor found: a weight if any is, else the gradient nearest the loss."""

    kind: str
    name: str
    rank: int

    def __str__(self) -> str:
        return f"{self.kind} of {self.name} on rank {self.rank}"


def find_culprit(model: ShardedModel, grads: Tensor, world: World) -> Culprit | None:
    """Ask every rank for its first non-finite tensor and agree on the one that went bad first. Collective.

    Gradients turn bad from the loss backwards, so the parameter nearest the loss is the first; a weight that is already
    bad comes before any gradient. None where only the loss is bad.
    """
    code, name = _first_bad(model, grads)
    axis = world.axis("world")
    text = name.encode()[:200].ljust(200)
    row = torch.tensor([[code, *text]], dtype=torch.int64)
    rows = axis.all_gather(row)
    rank = int(rows[:, 0].argmin())
    if rows[rank, 0] == _NONE:
        return None
    name = bytes(rows[rank, 1:].tolist()).decode().rstrip()
    return Culprit("weight" if rows[rank, 0] < 0 else "gradient", name, rank)


_NONE = 2**40


def _first_bad(model: ShardedModel, grads: Tensor) -> tuple[int, str]:
    """(order of badness, tensor name); weights before gradients, later layers before earlier ones."""
    found = (_NONE, "")
    stages = model.world.mesh.pp
    params = {slot.param: slot for slot in model.slots}
    for i, chunk in enumerate(model.chunks):
        position = (i * stages + model.world.coords.pp) * 10_000
        for j, param in enumerate(chunk.parameters()):
            if not param.parts:  # a vocabulary's share that is all padding
                continue
            slot = params[param]
            grad = grads[slot.offset : slot.offset + slot.numel]
            if not torch.isfinite(param).all():
                found = min(found, (position + j - _NONE, param.parts[0].name))
            elif not torch.isfinite(grad).all():
                found = min(found, (_NONE - 1 - position - j, param.parts[0].name))
    return found

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
    """The first non-finite tensor found: a weight if any is, else the gradient nearest the loss.

    peers: ranks of other data-parallel replicas that may have computed it instead, for the sum does not tell.
    """

    kind: str
    name: str
    rank: int
    peers: tuple[int, ...] = ()

    def __str__(self) -> str:
        or_else = f" or its data-parallel peer {', '.join(map(str, self.peers))}" if self.peers else ""
        return f"{self.kind} of {self.name} on rank {self.rank}{or_else}"


def find_culprit(model: ShardedModel, grads: Tensor, world: World, at_fault: bool) -> Culprit | None:
    """Ask every rank for its first non-finite tensor and agree on the one that went bad first. Collective.

    Gradients turn bad from the loss backwards, so the parameter nearest the loss is the first; a weight that is already
    bad comes before any gradient. None where only the loss is bad.

    at_fault: this rank knows that its own replica's numbers were bad before they were added to others'. Looking at all
    gradients before every reduction would tell always, and cost every step a pass over them.
    """
    code, name = _first_bad(model, grads)
    text = name.encode()[:200].ljust(200)
    rows = world.axis("world").all_gather(torch.tensor([[code, at_fault, *text]], dtype=torch.int64))
    replicas = [world.mesh.coords(rank).dp for rank in range(world.mesh.size)]
    guilty = {replica for replica, row in zip(replicas, rows, strict=True) if row[1]}
    found = [int(row[0]) for row in rows]
    asked = [r for r, dp in enumerate(replicas) if dp in guilty and found[r] != _NONE] if min(found) >= 0 else []
    rank = min(asked or range(len(found)), key=found.__getitem__)
    if found[rank] == _NONE:
        return None
    name = bytes(rows[rank, 2:].tolist()).decode().rstrip()
    if found[rank] < 0:
        return Culprit("weight", name, rank)
    peers = () if asked else tuple(peer for peer in world.mesh.group("dp", rank) if peer != rank)
    return Culprit("gradient", name, rank, peers)


_NONE = 2**40


def _first_bad(model: ShardedModel, grads: Tensor) -> tuple[int, str]:
    """(order of badness, tensor name); weights before gradients, later layers before earlier ones."""
    found = (_NONE, "")
    stages = model.world.mesh.pp
    params = {slot.param: slot for slot in model.trained}
    for i, chunk in enumerate(model.chunks):
        position = (i * stages + model.world.coords.pp) * 10_000
        for j, param in enumerate(chunk.parameters()):
            if not param.parts:  # a vocabulary's share that is all padding
                continue
            slot = params.get(param)
            grad = grads[:0] if slot is None else grads[slot.offset : slot.offset + slot.numel]
            if not torch.isfinite(param).all():
                found = min(found, (position + j - _NONE, param.parts[0].name))
            elif not torch.isfinite(grad).all():
                found = min(found, (_NONE - 1 - position - j, param.parts[0].name))
    return found

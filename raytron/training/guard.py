"""Guarding the numbers: when to doubt a step, when to skip it, when to stop, and what went bad first.

What is found out about a doubted step (recheck.py) and about replicas that differ (agreement.py) is a `Verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from raytron.config import GuardConfig
from raytron.models.base import ShardedModel
from raytron.parallel.collectives import World

if TYPE_CHECKING:
    from raytron.training.engine import Record

__all__ = ["Culprit", "Guard", "ReplicasDisagree", "TrainingStopped", "Verdict", "find_culprit", "square_sum"]

NORM_MEMORY = 0.95  # the running mean of gradient norms forgets over about 20 steps
WARM_STEPS = 20  # norms seen before a spike can be told from noise


class TrainingStopped(RuntimeError):  # noqa: N818 - an outcome, not a malfunction of the code
    """Too many steps in a row were skipped."""


class ReplicasDisagree(RuntimeError):  # noqa: N818 - reads as what was found
    """Data-parallel replicas hold different numbers, and no majority says whose are right."""


@dataclass(frozen=True)
class Verdict:
    """What was found out about numbers that could not be trusted.

    Attributes:
        kind: "data" (or the model: the same numbers come out wherever it is run), or "hardware".
        what: "non-finite", "spike" or "suspicious norm" of a step's gradients; "replicas differ".
        ranks: who computed or held wrong numbers: several of a replica, whose parts infect each other, and with `sure`
            off those of several replicas, of which one was wrong.
        hosts: (host name, process id) of each.
        lasting: they came again when the work was repeated.
        mended: the step went on with good numbers.
        tensor: what differed, where it was held.
        digests: of each of `ranks`: of its numbers, and of what they should have been.
        compared: another replica was asked.
    """

    kind: Literal["data", "hardware"]
    what: str
    ranks: tuple[int, ...] = ()
    hosts: tuple[tuple[str, int], ...] = ()
    sure: bool = True
    lasting: bool = False
    mended: bool = False
    tensor: str = ""
    digests: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    compared: bool = True

    def told(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"digests": {str(rank): list(pair) for rank, pair in self.digests.items()}}

    def __str__(self) -> str:
        if self.kind == "data":
            where = "here and on another replica" if self.compared else "here, and there is no other replica to ask"
            return f"{self.what} by data or model: the same when run again {where}"
        hosts = zip(self.ranks, self.hosts, strict=True)
        who = (", " if self.sure else " or ").join(f"{rank} ({host}, pid {pid})" for rank, (host, pid) in hosts)
        how = self.tensor or ("wrong again, and not on another replica" if self.lasting else "not when run again")
        end = "" if self.mended else "; no good numbers were found"
        return f"{self.what} by hardware of {f'rank {who}' if who else 'an unknown rank'}: {how}{end}"


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

    def doubt(self, norm: float, skip: str | None, record: Record) -> str | None:
        """Why not to believe a step before it was run again; None where there is no reason, or nobody asks."""
        factor = self.config.suspect_factor
        if skip is None and factor is not None and record.updates >= WARM_STEPS and norm > factor * record.norm_mean:
            skip = "suspicious norm"
        return skip if self.config.recheck else None

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


def square_sum(flat: Tensor, row: int = 4096) -> Tensor:
    """Sum of squares in float64 of per-row fp32 norms: exact enough for a global norm, and one pass over the data."""
    whole = flat.numel() // row * row
    squares = torch.linalg.vector_norm(flat[:whole].view(-1, row), dim=1).double().square().sum()
    return (squares + flat[whole:].double().square().sum()).cpu()


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

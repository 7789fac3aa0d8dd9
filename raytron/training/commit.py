"""What survivors of a fault make of the step they were in: a pure function of where each of them stands.

A step commits by a vote (engine.py), an all-reduce. Two facts follow. Whoever passed it has every rank's ballot, and a
rank casts its own only once its gradients (and those it mirrors) are reduced: so one passed vote proves that every
survivor can finish the step by itself. And nobody is ever more than one step ahead, since the next vote needs everyone
to have published this one. Hence:

    nobody passed the vote        the gradients are dropped, and the batch is done again     Redo
    somebody passed it            all take its numbers, update what they own, and publish    Finish
    somebody published already    the others take the vote of the step it published          Finish

"Drop the gradients and do it again", whatever the phase, would leave shards of two versions, or count a step twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["PHASES", "Finish", "Redo", "Resolution", "Standing", "Vote", "resolve"]

PHASES = ("between", "forward_backward", "vote", "update", "gather")
"""Of a step, in order: "vote" is from the reduced gradients to the update, "gather" from the update to the record."""


@dataclass(frozen=True)
class Vote:
    """What all ranks agreed on: loss (per token, or as the objective normalised it), global gradient norm, tokens,
    whether to apply it, what gradients are divided by, and the objective's further sums."""

    loss: float
    grad_norm: float
    tokens: int
    skip: str | None
    divisor: float
    sums: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """Where a rank stands, once nothing runs on it any more.

    step: the version it published last. phase: of the step after it, one of `PHASES`. vote: of that step, if it was
    passed here. last: the vote of `step` itself, for ranks that never heard it. whole: whether all of the rank's
    weights are of `step`, or only what its optimizer owns.
    """

    step: int
    phase: str = "between"
    vote: Vote | None = None
    last: Vote | None = None
    whole: bool = True


@dataclass(frozen=True)
class Redo:
    """Everyone is of version `step` already: drop what was begun after it. `whole` as in `Standing`, of all ranks."""

    step: int
    whole: bool = True


@dataclass(frozen=True)
class Finish:
    """Everyone becomes of version `step`, whose vote is `vote`."""

    step: int
    vote: Vote
    whole: bool = False


Resolution = Redo | Finish


def resolve(standings: Iterable[Standing]) -> Resolution:
    """What the ranks that are left do, so that all are of one version. Pure; every order of standings gives the same.

    Raises ValueError where there are none, or one stopped in the middle of its update: that rank's shard is torn, and
    it has to be counted among the lost.
    """
    standings = list(standings)
    if not standings:
        raise ValueError("nobody is left to say which version to go on from; restart from the newest checkpoint")
    if any(standing.phase == "update" for standing in standings):
        raise ValueError("a rank failed in the middle of its update, its shard is torn; count it among the lost")
    newest = max(standing.step for standing in standings)
    behind = [standing for standing in standings if standing.step < newest]
    ahead = [standing for standing in standings if standing.step == newest]
    voted = next((standing.vote for standing in ahead if standing.vote is not None), None)
    if voted is not None:
        assert not behind, f"a vote on step {newest + 1} was passed while a rank had not published {newest}"
        step, vote, unfinished = newest + 1, voted, ahead
    elif behind:
        step, vote, unfinished = newest, next(s.last for s in ahead if s.last is not None), behind
    else:
        return Redo(newest, all(standing.whole for standing in standings))
    for standing in unfinished:
        assert standing.step == step - 1, f"a rank is at step {standing.step} while step {step} was voted on"
        assert standing.phase in ("vote", "gather"), f"step {step} was voted on without a rank in {standing.phase}"
    return Finish(step, vote, vote.skip is not None and all(standing.whole for standing in standings))

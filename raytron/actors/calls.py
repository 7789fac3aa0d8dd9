"""One fan-out under way, and the search for what went wrong with it.

Ray's `get` raises for the first rank that fails, which is seldom the one to blame: a lost peer's neighbours see closed
sockets before anyone hears of its death, and when a node falls Ray itself learns it seconds later.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from raytron.actors.failures import DIED, GONE, HUNG, Failure, WorkerError, cause
from raytron.actors.members import LOOK_S, SILENT_S, Member, living_nodes, ready

if TYPE_CHECKING:
    from raytron.actors.group import ActorGroup

__all__ = ["Calls"]

SETTLE_S = 6.0  # how long to look for the cause when only its echoes have been heard
QUIET_S = 1.0  # so long after every rank has shown that it lives, no more news is expected
DEATH = "\nThe actor is dead because"  # where Ray's report gets to the point


class Calls:
    """A method called on several members of a group.

    Attributes:
        members, refs: who was called, and Ray's reference to each one's answer.
        ranks: those the members had when they were called.

    A failure is news for the whole group, which is told to give up, unless the calls are `aside`.
    """

    def __init__(
        self, group: ActorGroup, method: str, members: Sequence[Member], refs: list[ray.ObjectRef], aside: bool = False
    ) -> None:
        self._group, self.method, self.members, self.refs = group, method, tuple(members), refs
        self.ranks = tuple(member.rank for member in members)
        self._generation, self._aside = group.generation, aside

    def results(self, timeout_s: float | None = None) -> list[Any]:
        """What each member returned, in their order.

        Raises:
            WorkerError: a rank failed or died; every rank was told to give up.
            TimeoutError: not all answered in time; every rank was told to give up.
        """
        try:
            results = ray.get(self.refs, timeout=timeout_s)
            self._group.forget(self)
            return results
        except GetTimeoutError:
            over = ready(self.refs, 0)
            late = [rank for rank, ref in zip(self.ranks, self.refs, strict=True) if ref not in over]
            reason = f"ranks {late} did not answer {self.method} within {timeout_s:g} s"
            self._abandon(reason)
            raise TimeoutError(reason) from None
        except (RayActorError, RayTaskError, ObjectLostError) as error:
            told = self._group.broken  # by whoever watches the ranks: then echoes are all there is to hear
            self._abandon(f"a rank failed in {self.method}")
            raise self._blame(error, 0.0 if told else SETTLE_S) from None

    def _abandon(self, reason: str) -> None:
        if self._aside:
            for ref in self.refs:
                self._group.ignore(ref)
        elif self._generation == self._group.generation:  # an old generation's news must not break the new one
            self._group.abandon(reason)

    def _blame(self, error: Exception, settle_s: float) -> WorkerError | Exception:
        """Collect reports until one is a cause and not an echo, or none is to be expected."""
        failures: list[Failure] = []
        waiting = dict(zip(self.refs, self.members, strict=True))
        signs = {member.worker.where.remote(): member for member in self.members}  # of life
        start = quiet = looked = time.monotonic()
        while waiting and all(f.echo for f in failures):
            for ref in ready([*waiting, *signs], LOOK_S, at_least=1):
                member = signs.pop(ref, None) or waiting.pop(ref)
                failure = self._failure(ref, member)
                if failure and (failure.rank, failure.kind) not in {(f.rank, f.kind) for f in failures}:
                    failures.append(failure)
                    quiet = time.monotonic()
            now = time.monotonic()
            if now - looked >= LOOK_S:
                looked = now
                failures += self._silent([m for m in signs.values() if m in waiting.values()], now - start)
            if now - start > settle_s or (not signs and now - quiet > QUIET_S):
                break
        for ref in signs:
            self._group.ignore(ref)
        if not failures:  # none of ours: the arguments or the result could not be sent
            return error
        first = cause(failures)
        return WorkerError(first, tuple(f for f in failures if f is not first))

    def _silent(self, members: Sequence[Member], waited_s: float) -> list[Failure]:
        """Failures of those who have not said a word, not even on their control threads."""
        if not members:
            return []
        living = living_nodes({member.where.node for member in members})
        lost = {m: GONE for m in members if m.where.node not in living}
        self._group.gone |= {m.where.node for m in lost}
        if waited_s > SILENT_S:
            lost |= {m: HUNG for m in members if m not in lost}
        return [self._report(member, kind, f"within {waited_s:.1f} s") for member, kind in lost.items()]

    def _failure(self, ref: ray.ObjectRef, member: Member) -> Failure | None:
        try:
            ray.get(ref)
        except (RayActorError, ObjectLostError) as error:  # an answer may go down with its node
            text = str(error)
            return self._report(member, DIED, text[text.find(DEATH) + 1 :].strip())
        except RayTaskError as error:
            if isinstance(error.cause, WorkerError):
                return error.cause.failure
            # Ray's own trouble with a rank's answer, such as a result that cannot be pickled.
            return self._report(member, type(error.cause).__name__, str(error.cause), str(error))
        return None

    def _report(self, member: Member, kind: str, message: str, trace: str = "") -> Failure:
        where, rank = member.where, self.ranks[self.members.index(member)]
        return Failure(rank, where.host, where.pid, self.method, kind, message, trace)

"""A training group that goes on: through faults, and through changes of its size and shape, at the step it was at.

    steps ----> a boundary is asked for -> decide -> newcomers start, the others train on -> everyone moves -> steps
      |
      +-- fault -> all are released -> survivors agree on a version -> decide -> everyone moves -> steps
                                                                         |
                                                    nobody holds a part -+-> all begin from the newest checkpoint

What to do is decided by policy.py, a pure function; here decisions are carried out, each written to the journal with
its reason and what it took. A driver calls its group through `steps` and `call`, and hears of nothing but `Rewound`.
Where even this is not possible (no room, too many failures, the same error again at the same step) the fault is raised,
and the driver restarts from the newest checkpoint, or ends.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from raytron.actors.control import Control
from raytron.actors.demand import bundles
from raytron.actors.failures import GONE, HUNG, BrokenError, Failure, WorkerError
from raytron.actors.journal import wish_after
from raytron.actors.members import Member, living_nodes
from raytron.actors.moves import Job, Mover, Spent, Survivors
from raytron.actors.placement import CapacityError, cluster, room
from raytron.actors.policy import (
    ClusterState,
    Continue,
    Decision,
    Draining,
    Fault,
    Lost,
    Request,
    Rewind,
    Rules,
    Save,
    Slow,
    Spare,
    Stop,
    Unit,
    Wait,
    asked_for,
    decide,
    refusal,
    spares_to_start,
)
from raytron.actors.policy_costs import measured
from raytron.actors.runs import USER_ERRORS, Failures, first_line
from raytron.actors.suspects import Suspects
from raytron.actors.trainer import TrainerGroup

__all__ = ["Elastic", "Rewound"]

TRIES = 5  # faults within the recovery from one fault
AGAIN_S = 10.0  # before newcomers are asked for again, after the cluster refused some
GRANT_S = 10.0  # so long the cluster may take to grant seats that it has free
FAULTS = (WorkerError, TimeoutError, BrokenError)
DISAGREE = "ReplicasDisagree"  # the error of ranks that hold different numbers, and do not know whose are right


class Rewound(Exception):  # noqa: N818 - it is no error: the run goes on
    """All ranks began again from a checkpoint: `step` is its step (0: from the start), `damaged` what was wrong with
    newer ones."""

    def __init__(self, step: int, damaged: list[str]) -> None:
        super().__init__(f"the run goes on from step {step}")
        self.step, self.damaged = step, damaged


class Elastic:
    """Keeps a training group going.

    Args:
        group: whose tasks are created and loaded.
        job: what it hosts.
        control: how it is watched, talked to, and what is written down.
        bounds: (fewest, most) ranks.
        shapes: unit shapes that the model allows, the preferred one first.
        most_dp: the sequences of a global batch.
        failures: of the run, over all its attempts.
        rules: what decisions weigh.
        stop: once it is set nobody waits for the cluster any more.
        in_place: False raises every fault, and does only what is planned.
    """

    def __init__(
        self,
        group: TrainerGroup,
        job: Job,
        control: Control,
        *,
        bounds: tuple[int, int],
        shapes: tuple[Unit, ...],
        most_dp: int,
        failures: Failures,
        rules: Rules,
        stop: threading.Event,
        in_place: bool = True,
    ) -> None:
        self.group, self._job, self._control = group, job, control
        self._bounds, self._shapes, self._most_dp = bounds, shapes, most_dp
        self._failures, self._rules, self._stop, self._in_place = failures, rules, stop, in_place
        self._mover, self._mesh = Mover(group, job), group.mesh
        self._due: Decision | None = None
        self._newcomers: Future[list[Member]] | None = None
        self._history: list[Fault] = []
        self._requested = Request(**control.wish) if control.wish else None
        self._suspects, self._disagree = Suspects(), False
        self._looked_s = self._again_s = self._resized_s = self._saved_s = float("-inf")
        self._waiting_since_s: float | None = None
        self._step, self._failed_at, self._begun = 0, ("", -1), False
        if self._requested is not None:
            self._consider(self._requested)
        control.seated(group)

    # What a driver calls

    def steps(self, step: int, count: int, stop: Callable[[], bool] = lambda: False) -> Iterator[Any]:
        """The records of the `count` steps after `step`, in order, each once, whatever happens meanwhile.

        Raises:
            Rewound: all are at the step of a checkpoint now.
            WorkerError: there is no going on in place.
        """
        end = step + count
        if not self._begun:
            self._begun = True
            self._control.started(step)
        while step < end and not stop():
            unheard: list[Any] = []
            try:
                self._control.begins()
                for record in self.group.steps(end - step, lambda: stop() or self._wants_boundary()):
                    step = self._noted(record)
                    yield record
                if self._due is not None:
                    self._change()
            except FAULTS as error:
                unheard = self._recovered(_told(error), step)
            for record in unheard:
                step = self._noted(record, regained=True)
                yield record

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The group's `method`, again after every fault. Raises like `steps`."""
        while True:
            self._control.begins()
            try:
                return getattr(self.group, method)(*args, **kwargs)
            except FAULTS as error:
                self._recover(_told(error))

    def saved(self) -> None:
        """A checkpoint of now is on its way."""
        self._saved_s = time.time()
        self._control.note("saved")

    # Planned changes

    def _wants_boundary(self) -> bool:
        """Look at the state of things now and then; whether there is something to do that needs everyone."""
        now = time.monotonic()
        if self._due is not None or now - self._looked_s < self._rules.poll_s:
            return self._due is not None
        self._looked_s = now
        self._take_requests()
        if self._newcomers is not None and not self._arrived():
            return False
        state = self._state({}, True)
        self._ask_for_room(state)
        decision = decide(state)
        if isinstance(decision.action, Continue):
            self._keep_spares()
            return False
        if (more := self._mover.missing(decision) - len(self.group.spares)) > 0:
            if now >= self._again_s:
                self._control.decided(decision)
                self._start(more, decision)
            return False
        self._due = decision
        return True

    def _change(self) -> None:
        """Carry out what is due. Nobody is within a step."""
        decision, self._due = self._due, None
        self._control.decided(decision)
        if isinstance(decision.action, Save):
            self.group.save(wait=True)
            self.saved()
            return
        self.group.call("latest")  # a save under way would be cut off
        bad = {*self._control.slow(), *self._suspects.faulty}
        slow = [(place, self._mover.nodes[place]) for place in decision.leave if place in bad]
        spent = Spent()
        self._mover.carry_out(decision, None, spent)
        self._moved("resized", decision, spent)
        self._history += [Fault(time.time(), node, "slow", (place,)) for place, node in slow]

    def _start(self, count: int, decision: Decision | None = None) -> None:
        unit = None if decision is None else replace(decision.mesh, dp=1, ep=1, etp=None)
        avoid = decision.avoid if decision else frozenset(self._control.watch.draining)
        self._newcomers = self.group.recruit(count, unit, engine=self._job.newcomer, wait_s=GRANT_S, avoid=avoid)

    def _arrived(self, wait: bool = False) -> bool:
        """Whether nobody is on the way any more; who arrived stands by."""
        if self._newcomers is None:
            return True
        if not wait and not self._newcomers.done():
            return False
        newcomers, self._newcomers = self._newcomers, None
        try:
            self.group.spares += (arrived := newcomers.result())
            names = [member.name for member in arrived]
            self._control.note("newcomers", places=names, start_s=round(self.group.recruiting_s, 4))
            self._control.seated(self.group)
        except (CapacityError, *FAULTS) as error:
            self._again_s = time.monotonic() + AGAIN_S
            self._control.note("no newcomers", why=first_line(error))
        return True

    def _keep_spares(self) -> None:
        """As many as wanted: start what is missing, end what nobody needs."""
        spares = self.group.spares
        if extra := len(spares) - self._rules.spares:
            if extra > 0:
                self.group.dismiss(spares[-extra:])
            elif time.monotonic() >= self._again_s and (count := spares_to_start(self._state({}, True))):
                self._start(count)

    def _take_requests(self) -> None:
        for asked in self._control.requests():
            if asked.get("engines") is not None:
                self._control.answer(asked, "this run has no rollout engines; --num-workers changes its ranks")
                continue
            request = Request(**wish_after(self._control.wish, asked, time.time()))
            self._consider(request)
            why = refusal(self._state({}, True), request)
            self._control.answer(asked, why)
            if why is None:
                self._requested = request

    def _consider(self, request: Request) -> None:
        """Count the shape that is asked for among those the model allows, if it does."""
        usual = self._shapes[0]
        unit = Unit(request.pp or usual.pp, usual.cp, request.tp or usual.tp)
        if unit not in self._shapes and self._job.fits(unit.tp, unit.pp):
            self._shapes += (unit,)

    # Faults

    def _recovered(self, error: WorkerError, step: int) -> list[Any]:
        """Recover, and the records after `step` that were on their way when the driver lost them."""
        while True:
            self._recover(error)
            try:
                found = max(self.group.consult(self.group.members, "since", step), key=len)
            except FAULTS as another:
                error = _told(another)
            else:
                self._control.regained(found)
                return found

    def _recover(self, error: WorkerError) -> None:
        """Everyone is of one version again, and seated; or `Rewound`, or the fault is raised."""
        known_s = time.time()
        self.group.abandon(first_line(error))
        self._refuse_hopeless(error)
        self._due = None
        for _ in range(TRIES):
            try:
                self._settle(known_s, error)
                return
            except FAULTS as another:
                if another is error:  # it was found hopeless
                    raise
                error = _told(another)
                self._refuse_hopeless(error)
                self.group.abandon(first_line(error))
        raise error

    def _refuse_hopeless(self, error: WorkerError) -> None:
        """Raise what cannot be mended here: an error that is the user's, one that comes again, one too many."""
        failure = error.failure
        again = (failure.kind, self._step) if failure.trace and not failure.echo else ("", -1)
        if failure.kind in USER_ERRORS or again == self._failed_at != ("", -1):
            raise error
        self._failed_at = again
        if not self._in_place or not self._failures.survives(error):
            raise error

    def _settle(self, known_s: float, error: WorkerError) -> None:
        spent = Spent()
        left = self._mover.survivors(spent)
        self._remember(left)
        if error.failure.kind == DISAGREE:
            self._disagree = True  # until all have begun again from what was right
            self._control.note("disagreement", step=self._step, what=error.failure.message)
        self.group.lose(left.lost)  # what hangs is ended, and chairs on lost nodes are given back
        decision = self._decided(left, spent, error)
        if not isinstance(decision.action, Rewind):
            self._mover.carry_out(decision, left, spent)
            self._moved("recovered", decision, spent, known_s)
            return
        step, damaged = self._mover.start_over(decision, left, spent)
        self._disagree = False
        self._step = step
        self._moved("rewound", decision, spent, known_s, redone_s=self._control.rewound(step))
        raise Rewound(step, damaged)

    def _decided(self, left: Survivors, spent: Spent, error: WorkerError) -> Decision:
        """What to do about the loss, once there are all whom it needs."""
        while True:
            self._arrived()  # who was on the way already holds seats that nobody else can have
            state = self._state(left.lost, left.covered)
            self._ask_for_room(state)
            decision = decide(state)
            self._control.decided(decision)
            if isinstance(decision.action, Stop):
                raise error
            if isinstance(decision.action, Wait):
                self._waiting_since_s = self._waiting_since_s or time.time()
                if self._stop.wait(decision.action.seconds):
                    raise error
                continue
            if self._enough(decision, spent):
                self._waiting_since_s = None
                return decision

    def _enough(self, decision: Decision, spent: Spent) -> bool:
        """Start whom the decision needs; whether they came."""
        with spent.timed("newcomers"):
            if self._mover.missing(decision) > len(self.group.spares):
                self._arrived(wait=True)  # who is on the way already
            if (more := self._mover.missing(decision) - len(self.group.spares)) > 0:
                self._start(more, decision)
                self._arrived(wait=True)
            return self._mover.missing(decision) <= len(self.group.spares)

    def _remember(self, left: Survivors) -> None:
        by: dict[tuple[str, str], list[str]] = {}
        for place, how in left.lost.items():
            by.setdefault((self._mover.nodes[place], self._how(place, how)), []).append(place)
        known = {place for fault in self._history for place in fault.places}
        for (node, how), places in by.items():
            if set(places) - known:
                self._history.append(Fault(time.time(), node, how, tuple(places)))

    def _how(self, place: str, how: str) -> str:
        if how == GONE or self._mover.nodes[place] not in living_nodes():  # Ray tells of its actors' deaths first
            return "node"
        return "hung" if how == HUNG or place in self._control.watch.hung else "died"

    def _ask_for_room(self, state: ClusterState) -> None:
        together = asked_for(state)
        self._control.want(bundles(together, self.group.each), ranks=sum(together))

    # What is known

    def _state(self, lost: Mapping[str, str], covered: bool) -> ClusterState:
        mover, watch, now = self._mover, self._control.watch, time.time()
        places = mover.seating.places
        return ClusterState(
            now_s=now,
            mesh=mover.seating.mesh,
            places=places,
            nodes=tuple(mover.nodes[place] for place in places),
            bounds=self._bounds,
            free=self._free(lost),
            lost=tuple(Lost(p, mover.nodes[p], self._how(p, how)) for p, how in lost.items()),
            slow=tuple(Slow(place, score) for place, score in self._control.slow().items()),
            draining=tuple(Draining(node, until) for node, until in watch.draining.items()),
            spares=tuple(Spare(spare.name, spare.where.node) for spare in self.group.spares),
            faulty=tuple(place for place in places if place in self._suspects.faulty),
            disagree=self._disagree,
            covered=covered,
            shapes=self._shapes,
            most_dp=self._most_dp,
            requested=self._requested,
            history=tuple(self._history[-64:]),
            at_boundary=True,
            step_s=watch.step_s or 0.0,
            waiting_since_s=self._waiting_since_s,
            resized_s=self._resized_s,
            saved_s=self._saved_s,
            left_s=self._control.left_s(self._step),
            rules=measured(self._rules, self._control.costs),
        )

    def _free(self, lost: Mapping[str, str]) -> dict[str, int]:
        """Ranks that could start, by node: in what Ray has free, and on chairs that nobody sits on."""
        nodes = [node for node in cluster() if node.id not in self.group.gone]
        free = Counter({node.id: room(node.available, self.group.each) for node in nodes})
        free.update(chair.seat.node for chair in self.group.vacant if chair.seat.node in free)
        gone = [self._mover.nodes[place] for place in lost if self.group.member(place) is None]
        free.subtract(node for node in gone if node in free)  # counted as seats of the lost already
        return {node: count for node, count in free.items() if count > 0}

    def _noted(self, record: Any, regained: bool = False) -> int:
        if not regained:  # else it is accounted for already
            self._control.stepped(record)
        self._step = record.step
        if record.verdict:
            self._history += self._suspects.judged(record.verdict, self.group.members, time.time())
            self._control.note("verdict", step=record.step, **record.verdict)
        return record.step

    def _moved(self, event: str, decision: Decision, spent: Spent, known_s: float | None = None, **more: float) -> None:
        mesh = decision.mesh
        if mesh != self._mesh:
            self._mesh, self._resized_s = mesh, time.time()
        took = {} if known_s is None else {"recovery_s": round(time.time() - known_s, 4)}
        what = {"action": decision.kind, "mesh": [mesh.dp, mesh.pp, mesh.cp, mesh.tp]}
        self._control.note(event, **what, generation=self.group.generation, **took, **more, **spent.told())
        self._control.seated(self.group)


def _told(error: WorkerError | TimeoutError | BrokenError) -> WorkerError:
    """A rank's silence is a failure like any other, and so is what the watch noticed before any call did."""
    if isinstance(error, WorkerError):
        return error
    return WorkerError(Failure(None, "the driver's host", os.getpid(), "waiting", type(error).__name__, str(error)))

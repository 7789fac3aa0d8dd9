"""Who of a group is dead, hangs, is slow, or sits on a node that is to leave. Each is noticed by its own means.

    dead actor      Ray says so; calls under way fail, and no watching is needed
    dead node       its raylet refuses connections once its peers have seen closed sockets; else Ray's node table
    stopped process its control thread does not answer
    stopped node    nor does its raylet; nothing is to be started there
    hung engine     nothing happens for many steps' time, and it is not waiting for a peer: whoever waits is a victim
    nobody moves    everyone waits for a peer: a message was lost; all are released and do the step again
    slow rank       its own work takes longer than that of its peers in the same pipeline stage; waiting does not count
    leaving node    Ray's drain state (`ray drain-node`, an autoscaler, or a spot instance's notice that was passed on)

What hangs is ended at once: its process can never be trusted to stay hung. `judge` is pure; `Watch` is a thread of the
driver that asks every member on its control thread and acts on the verdict.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any

import ray
from ray.exceptions import RayError

from raytron.actors.failures import GONE, HUNG
from raytron.actors.members import Member, draining, frozen_nodes, living_nodes, ready
from raytron.actors.reseating import ElasticGroup
from raytron.actors.worker import Progress

__all__ = ["Limits", "Stillness", "Verdict", "Watch", "judge", "scores"]

log = logging.getLogger(__name__)

STEPPING = "train_step"
RECENT = 50  # steps whose median says how long one takes
WARM = 3  # steps before which no median is believed
WINDOW_S = 30.0  # over which ranks' speeds are compared


@dataclass(frozen=True)
class Limits:
    """How much patience there is.

    Attributes:
        silence_s: a control thread answers within this.
        still_s: a step under way shows some progress within this, whatever the median step is ...
        factor: ... and within so many median steps.
        other_s: the same for an evaluation, a save or a load, and for the first steps.
    """

    silence_s: float = 20.0
    still_s: float = 120.0
    factor: float = 20.0
    other_s: float = 3600.0

    def of(self, method: str, step_s: float | None) -> float:
        """Patience with `method`, where a step takes `step_s` (None: unknown yet)."""
        if method != STEPPING or step_s is None:
            return self.other_s
        return max(self.still_s, self.factor * step_s)


@dataclass(frozen=True)
class Stillness:
    """What was heard of a member: its last progress, and how long ago it was asked without having answered since."""

    progress: Progress | None = None
    silent_s: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """Members that hang, with why; or, where all wait for each other, why everyone is to be released."""

    hung: Mapping[str, str]
    deadlock: str | None = None


def judge(heard: Mapping[str, Stillness], limits: Limits, step_s: float | None) -> Verdict:
    """Who hangs, of members by name."""
    hung, waiting, busy = {}, [], 0
    for name, still in heard.items():
        progress = still.progress
        if still.silent_s > limits.silence_s:
            hung[name] = f"its control thread has been silent for {still.silent_s:.1f} s"
        elif progress is None or progress.method is None:
            continue
        else:
            busy += 1
            limit = limits.of(progress.method, step_s)
            if progress.waiting_s is not None:
                waiting.append(progress.waiting_s > limit)
            elif progress.still_s > limit:
                hung[name] = f"nothing has happened in {progress.method} for {progress.still_s:.1f} s"
    stuck = not hung and busy > 0 and len(waiting) == busy and all(waiting)
    return Verdict(hung, f"all {busy} ranks wait for each other" if stuck else None)


def scores(busy_s: Mapping[str, float], stages: Mapping[str, int]) -> dict[str, float]:
    """How many times as long as its peers' median each member's own work takes, among those of its pipeline stage.

    Args:
        busy_s: seconds of its own work in a step, by member.
        stages: pipeline stage of each.
    """
    found = {}
    for stage in set(stages.values()):
        here = {name: busy_s[name] for name in busy_s if stages.get(name) == stage}
        middle = median_low(here.values()) if here else 0.0
        if middle > 0 and len(here) > 1:
            found |= {name: seconds / middle for name, seconds in here.items()}
    return found


class Watch:
    """Looks after `group` every `period_s` seconds until closed.

    Args:
        tell: called, from this thread, with (event, what happened) for each thing noticed.
        visit: called once a look, from this thread.

    Attributes:
        hung: members that were ended since they hung, and why.
        draining: nodes that are to leave, and when (Unix time).
    """

    def __init__(
        self,
        group: ElasticGroup,
        limits: Limits,
        tell: Callable[[str, str], Any],
        visit: Callable[[], Any] = lambda: None,
        period_s: float = 0.5,
    ) -> None:
        self._group, self._limits, self._tell, self._visit, self._period_s = group, limits, tell, visit, period_s
        self.hung: dict[str, str] = {}
        self.draining: Mapping[str, float] = {}
        self._steps_s: deque[float] = deque(maxlen=RECENT)
        self._asked: dict[str, tuple[ray.ObjectRef, float]] = {}
        self._heard: dict[str, Progress] = {}
        self._speeds: dict[str, deque[tuple[float, int, float]]] = {}
        self._told: set[str] = set()
        self._generation = group.generation
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raytron-watch", daemon=True)
        self._thread.start()

    @property
    def step_s(self) -> float | None:
        """The median step, None while too few are known."""
        return median(self._steps_s) if len(self._steps_s) >= WARM else None

    def step(self, seconds: float) -> None:
        """A step took so long."""
        self._steps_s.append(seconds)

    def slow(self) -> dict[str, float]:
        """Scores of the seated members (see `scores`), as far as they are known."""
        mesh, seated = self._group.mesh, list(self._group.members)
        busy = {name: seconds for name, speeds in list(self._speeds.items()) if (seconds := _busy(speeds)) is not None}
        stages = {m.name: mesh.coords(m.rank).pp for m in seated if m.rank is not None and m.rank < mesh.size}
        return scores({name: busy[name] for name in stages if name in busy}, stages)

    def close(self) -> None:
        """Stop looking."""
        self._closing.set()
        self._thread.join()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closing.wait(self._period_s):
            try:
                self._look()
                self._visit()
            except RayError as error:  # the cluster itself is going, or a member went between two questions
                log.debug("while looking after the group: %s", error)

    def _look(self) -> None:
        members = [*self._group.members, *self._group.spares]
        if self._generation != self._group.generation:  # what was heard is of a time before
            self._generation = self._group.generation
            self._heard.clear()
            self._speeds.clear()
            self._steps_s.clear()  # the first step on another mesh may compile
        self._ask(members)
        self._nodes(members)
        now, seated = time.monotonic(), {member.name: member for member in members}
        silent = {name: now - since for name, (_, since) in self._asked.items()}
        heard = {name: Stillness(self._heard.get(name), silent.get(name, 0.0)) for name in seated}
        verdict = judge(heard, self._limits, self.step_s)
        if mute := {seated[name].where.node for name, why in verdict.hung.items() if "silent" in why}:
            self._group.gone |= frozen_nodes(mute)
        for name, why in verdict.hung.items():
            self._end(seated[name], why)
        if verdict.deadlock and self._group.broken is None:
            self._tell("deadlock", verdict.deadlock)
            self._group.abandon(verdict.deadlock)

    def _ask(self, members: Sequence[Member]) -> None:
        """Take what answers there are, and ask again those that have answered."""
        names = {member.name for member in members}
        for name in [name for name in self._asked if name not in names]:
            self._group.ignore(self._asked.pop(name)[0])
        for ref in ready([ref for ref, _ in self._asked.values()], 0.0):
            name = next(name for name, (asked, _) in self._asked.items() if asked == ref)
            del self._asked[name]
            try:
                self._note(name, ray.get(ref))
            except RayError:  # it died: calls under way say so
                self._heard.pop(name, None)
        for member in members:
            if member.name not in self._asked:
                self._asked[member.name] = (member.worker.progress.remote(), time.monotonic())

    def _note(self, name: str, progress: Progress) -> None:
        self._heard[name] = progress
        speeds = self._speeds.setdefault(name, deque())
        speeds.append((time.monotonic(), progress.steps, progress.busy_s))
        while len(speeds) > 2 and speeds[-1][0] - speeds[1][0] > WINDOW_S:
            speeds.popleft()

    def _nodes(self, members: Sequence[Member]) -> None:
        living, self.draining = living_nodes(), draining()
        for member in members:
            if member.where.pid and member.where.node not in living and member.name not in self._told:
                self._told.add(member.name)
                self._tell("node", f"{member} was on node {member.where.node[:8]}: {GONE}")
                if member.rank is not None:
                    self._group.abandon(f"{member}: {GONE}")
        for node in set(self.draining) - self._told:
            self._told.add(node)
            self._tell("drain", f"node {node[:8]} is to leave")

    def _end(self, member: Member, why: str) -> None:
        if member.name in self.hung:
            return
        self.hung[member.name] = why
        self._tell("hung", f"{member} {HUNG if 'silent' in why else 'hangs'}: {why}")
        if member.rank is not None:
            self._group.abandon(f"{member} hangs: {why}")
        ray.kill(member.worker)


def _busy(speeds: Sequence[tuple[float, int, float]]) -> float | None:
    """Seconds of own work in a step, over the window; None while that is too short."""
    (start, steps, busy), (end, more_steps, more_busy) = speeds[0], speeds[-1]
    if end - start < WINDOW_S / 2 or more_steps <= steps:
        return None
    return (more_busy - busy) / (more_steps - steps)

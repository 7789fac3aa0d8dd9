"""A run's connection to the world: it is watched, talked to, told of, and what happens to it is written down.

Everything here is about knowing; what to do about it is decided and done elsewhere (policy.py, elastic.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from raytron.actors.account import Account
from raytron.actors.demand import Demand
from raytron.actors.failures import BrokenError, WorkerError
from raytron.actors.health import Limits, Watch
from raytron.actors.journal import JOURNAL, PAGE, Journal, past, read_journal, wish_after
from raytron.actors.mailbox import open_mailbox
from raytron.actors.policy import Decision
from raytron.actors.policy_costs import TELLING
from raytron.actors.reseating import ElasticGroup
from raytron.actors.runs import first_line, write_json
from raytron.config import ElasticConfig
from raytron.metrics import status_page

__all__ = ["CLUSTER", "Control"]

CLUSTER = "cluster.json"  # in the run's folder: where its driver and its mailbox are
VISIT_S = 1.0  # between two visits to the mailbox
SAID = (
    "fault",
    "hung",
    "node",
    "drain",
    "deadlock",
    "disagreement",
    "decided",
    "recovered",
    "rewound",
    "resized",
    "no newcomers",
    "waiting",
    "engine joined",
    "engine left",
    "no engines",
)
PATIENCE_S = 5.0  # with the mailbox
COSTS = 50  # events to know costs from


class Control:
    """Of the run `name`, for all its attempts.

    Args:
        folder: the run's, where the journal and the address of its cluster are kept.
        config: the run's. steps: of the whole run.
        say: takes a line for the user.
        setup: the run's sizes as configured, JSON.
        autoscaled: whether the cluster may have an autoscaler, which is then asked for what the run wants.

    Attributes:
        watch: of the group at hand, see `watching`.
        past: what the drivers before this one left.
        wish: what users have asked for and still stands, see `journal.wish_after`.
        costs: the last events that tell what recoveries and changes take, those of earlier starts included.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        config: ElasticConfig,
        steps: int,
        say: Callable[[str], None],
        setup: Mapping[str, Any],
        autoscaled: bool = False,
    ) -> None:
        self._steps, self._say, self._stragglers = steps, say, config.replace_slow
        self._limits = Limits(config.silence_s, config.hang_s, config.hang_factor)
        self._name, self._folder = name, folder
        self._mailbox = open_mailbox(name)  # once there is no other driver of this run
        before = read_journal(folder / JOURNAL)
        self.past = past(before, setup)
        self.wish = self.past.wish
        self.costs = deque((event for event in before if event["event"] in TELLING), COSTS)
        self._journal = Journal(folder / JOURNAL)
        where = {"address": ray.get_runtime_context().gcs_address, "pid": os.getpid()}
        where["auth_mode"] = os.environ.get("RAY_AUTH_MODE")  # Ray sets it in whoever starts a local cluster
        write_json(folder / CLUSTER, where)
        self._lock = threading.Lock()
        self._asked: list[dict[str, Any]] = []
        self._answers: dict[int, str] = {}
        self._status: dict[str, Any] = {"run": name, "steps": steps, "step": 0, "pid": os.getpid()}
        self._start_s, self._recoveries, self._visited_s = time.time(), 0, 0.0
        self._account, self._seats, self._demand = Account(self._start_s), {}, Demand(autoscaled)
        self._last: tuple[Any, ...] = ()
        self._started = False
        self.watch: Watch | None = None
        began = {"run": name, "steps": steps, "setup": dict(setup)}
        self.note("began", **began, what="the driver before this one died" if self.past.interrupted else "")

    @contextmanager
    def watching(self, group: ElasticGroup) -> Iterator[Watch]:
        """Watch `group`, and be talked to, for the length of the block."""
        with Watch(group, self._limits, lambda event, what: self.note(event, what=what), self.visit) as self.watch:
            try:
                yield self.watch
            except (WorkerError, TimeoutError, BrokenError) as error:
                self.note("failed", what=first_line(error), **self.unheard())
                raise
        self.visit(last=True)

    def note(self, event: str, **what: Any) -> None:
        """Write down that this happened now."""
        self._recoveries += event in ("recovered", "rewound")
        if event != "decided":
            self._last = ()
        known = {"step": self._status["step"], "useful_s": round(self._account.useful_s, 4)}
        entry = self._journal.note(event, **known | what)
        if event in TELLING:
            self.costs.append(entry)
        if event in SAID:
            self._say(_line(event, what))

    def decided(self, decision: Decision) -> None:
        """Write down what was decided and why, once while it stays the same."""
        kind, mesh = decision.kind, decision.mesh
        if (kind, mesh, decision.leave) != self._last:
            self._last = (kind, mesh, decision.leave)
            self.note("decided", action=kind, mesh=_sizes(mesh), leave=list(decision.leave), reason=decision.reason)

    def want(self, bundles: Sequence[Mapping[str, float]], **counts: int) -> None:
        """Ask the autoscaler for room, see `Demand.want`; `counts` says for what, in the journal."""
        if self._demand.want(bundles):
            self.note("asked", **counts)

    def begins(self) -> None:
        """Something new is begun: steps, an evaluation, a save."""
        self._account.begins(time.time())

    def unheard(self) -> dict[str, float]:
        """Seconds since anything was begun or done, and the median step: what a fault is noted with, when it is known
        first."""
        return {"since_s": round(self._account.unheard_s(time.time()), 4), "step_s": round(self._account.step_s, 4)}

    def started(self, step: int) -> None:
        """A group of actors begins at `step`."""
        redone = self._account.back_to(step)
        self._status["step"] = step
        self._started = True
        self.note("started", redone_s=round(redone, 4))

    def stepped(self, record: Any) -> None:
        """A step was done."""
        if not self._started:  # nobody said that actors are ready
            self.started(record.step - 1)
        self._account.step(record.step, record.step_time_s, time.time())
        if self.watch is not None:
            self.watch.step(record.step_time_s)
        self._stands_at(record)

    def regained(self, records: Sequence[Any]) -> None:
        """Steps were done or finished that nobody had heard of before the fault."""
        steps = [(record.step, record.step_time_s) for record in records]
        if steps:
            seconds = self._account.regained(steps, time.time())
            self._stands_at(records[-1])
            self.note("regained", seconds=round(seconds, 4))

    def rewound(self, step: int) -> float:
        """All ranks are back at `step`: seconds of the steps that are to be done again."""
        self._status["step"] = step
        return round(self._account.back_to(step), 4)

    def _stands_at(self, record: Any) -> None:
        self._status |= {"step": record.step, "loss": record.loss, "step_time_s": record.step_time_s}

    def seated(self, group: ElasticGroup) -> None:
        """The group sits as it does now."""
        rows = [(m.rank, m.name, m.where) for m in (*group.members, *group.spares)]
        ranks = [{"rank": rank, "place": name, **asdict(where)} for rank, name, where in rows]
        self._status |= {"mesh": _sizes(group.mesh), "generation": group.generation, "ranks": ranks}
        if (seats := _seats(group)) != self._seats:
            self._seats = seats
            self.note("seated", **seats)

    def engines(self, rows: list[dict[str, Any]]) -> None:
        """A run's rollout engines are these now; see `RolloutGroup.members`."""
        self._status["engines"] = rows

    def slow(self) -> Mapping[str, float]:
        """Scores of seated members, where anybody wants to hear of slow ones."""
        return self.watch.slow() if self._stragglers else {}

    def left_s(self, step: int) -> float:
        """How long the run will go on, as far as is known."""
        return (self._steps - step) * self.watch.step_s if self.watch.step_s else float("inf")

    def requests(self) -> list[dict[str, Any]]:
        """What users have asked for since the last time."""
        with self._lock:
            asked, self._asked = self._asked, []
        return asked

    def answer(self, asked: Mapping[str, Any], refusal: str | None) -> None:
        """Tell whoever asked that it will be done, or why not."""
        what = {key: value for key, value in asked.items() if key != "number"}
        self.note("request", asked=what, refused=refusal)  # first: what was promised is kept by the next driver too
        if refusal is None:
            self.wish = wish_after(self.wish, what, time.time())
        with self._lock:
            self._answers[asked["number"]] = refusal or ""

    def failed(self, count: int, allowed: int, why: str) -> None:
        """A failure was counted, the run's `count`-th of `allowed`."""
        of = "" if allowed < 0 else f" of {allowed}"
        self.note("fault", count=count, what=f"failure {count}{of}: {why}", **self.unheard())

    def close(self, why: str = "") -> None:
        """Be reachable no more, and leave the page; `why` says what ended the run, where it was no success."""
        self._demand.close()
        self.note("ended", why=why)
        status_page(read_journal(self._folder / JOURNAL), self._folder / PAGE, self._name)
        ray.kill(self._mailbox)

    def __enter__(self) -> Control:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.close("" if error is None else f"{type(error).__name__}: {first_line(error)}")

    def visit(self, last: bool = False) -> None:
        """Leave status and answers in the mailbox and take requests out, unless that was done a moment ago."""
        if not last and time.monotonic() - self._visited_s < VISIT_S:
            return
        self._visited_s = time.monotonic()
        with self._lock:
            answers, self._answers = self._answers, {}
        try:
            asked = ray.get(self._mailbox.visit.remote(self.status(), answers), timeout=PATIENCE_S)
        except (RayError, TimeoutError):  # the run does not depend on it
            return
        with self._lock:
            self._asked += asked

    def status(self) -> dict[str, Any]:
        """JSON-ready: what `raytron status` shows."""
        now, useful = time.time(), self._account.useful_s
        wall = now - self._start_s
        numbers = {"time": now, "wall_s": wall, "useful_s": useful, "goodput": min(1.0, useful / wall)}
        return {**self._status, **numbers, "recoveries": self._recoveries, "events": self._journal.recent}


def _seats(group: ElasticGroup) -> dict[str, Any]:
    """Who sits where, short: a place and the number of its node, by rank and of those who stand by."""
    members, nodes = [*group.members, *group.spares], {}
    for member in members:
        nodes.setdefault(member.where.node, (len(nodes), member.where.host))
    rows = [[member.name, nodes[member.where.node][0]] for member in members]
    return {
        "generation": group.generation,
        "mesh": _sizes(group.mesh),
        "nodes": [[node, host] for node, (_, host) in nodes.items()],
        "ranks": rows[: len(group.members)],
        "spares": rows[len(group.members) :],
    }


def _sizes(mesh: Any) -> list[int]:
    return [mesh.dp, mesh.pp, mesh.cp, mesh.tp]


def _line(event: str, what: Mapping[str, Any]) -> str:
    """What the user hears of an event."""
    if event == "engine joined":
        return (
            f"engine {what['engine']} joined after {what['seconds']:.1f} s, with weights of version {what['version']}"
        )
    if event == "engine left":
        return f"engine {what['engine']} left: {what['reason']}"
    if event in ("recovered", "rewound", "resized"):
        dp, pp, _, tp = what["mesh"]
        took = sum(seconds for part, seconds in what.items() if part.endswith("_s") and part != "recovery_s")
        seconds = what.get("recovery_s", took)
        return f"{event}: dp {dp} x pp {pp} x tp {tp} after {seconds:.2f} s, {what['bytes_moved'] / 1e6:,.1f} MB moved"
    return str(what.get("what") or what.get("reason") or f"{event}: {what.get('why')}")

"""What the elastic policy is told, and what it may answer: plain frozen records, nothing of Ray, torch or clocks.

Whoever watches the cluster fills a `ClusterState`; `policy.decide` makes a `Decision` of it; whoever acts carries that
out. All times are seconds of one clock of the caller's. A *place* is an actor's stable name ("actor-7"), never a rank;
a *unit* is one dense replica (pp x cp x tp ranks), the step of size; a node is the fault domain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal, NamedTuple, TypeAlias

from raytron.parallel.mesh import Mesh

__all__ = [
    "Action",
    "ClusterState",
    "Continue",
    "Decision",
    "Draining",
    "Fault",
    "Grow",
    "Lost",
    "Replace",
    "Request",
    "Reshape",
    "Rewind",
    "Rules",
    "Save",
    "Shrink",
    "Slow",
    "Spare",
    "Stop",
    "Unit",
    "Wait",
]


class Unit(NamedTuple):
    """The shape of one dense replica."""

    pp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        """Its ranks."""
        return self.pp * self.cp * self.tp

    @classmethod
    def of(cls, mesh: Mesh) -> Unit:
        """The unit of `mesh`."""
        return cls(mesh.pp, mesh.cp, mesh.tp)


# ------------------------------------------------------------------------------------------------------ what is known


@dataclass(frozen=True)
class Lost:
    """A place of the mesh that computes no more: its process died, hangs (and lives still), or went with its node."""

    place: str
    node: str
    how: Literal["died", "hung", "node"]


@dataclass(frozen=True)
class Slow:
    """A living place whose own work takes `score` times as long as the median rank's."""

    place: str
    score: float


@dataclass(frozen=True)
class Draining:
    """A node that was told at `since_s` (-inf: nobody knows when) that it ends at `deadline_s`."""

    node: str
    deadline_s: float
    since_s: float = -inf


@dataclass(frozen=True)
class Spare:
    """A place that is started and warm, and sits nowhere in the mesh."""

    place: str
    node: str


@dataclass(frozen=True)
class Fault:
    """Something that went wrong earlier and was dealt with; "slow" is a straggler or a faulty place that left,
    "numbers" a place that computed or held wrong ones."""

    at_s: float
    node: str
    how: Literal["died", "hung", "node", "slow", "numbers"]
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What the user asked for at `at_s`; None leaves a number as it is. It stands until the next request."""

    num_workers: int | None = None
    tp: int | None = None
    pp: int | None = None
    at_s: float = -inf


@dataclass(frozen=True)
class Rules:
    """What the decisions weigh. Costs are guesses, until some are measured (policy_costs.py).

    Raises:
        ValueError: a number that makes no sense, with its name.
    """

    spare_s: float = 1.0
    """Everyone stands still so long while a warm spare takes a seat."""
    cold_s: float = 5.0
    """A process needs so long from nothing to its seat."""
    move_s: float = 1.0
    """Everyone stands still so long while the job changes its size or shape."""
    hold_s: float = 10.0
    """No growing sooner than this after a fault or a change of size."""
    horizon_s: float = 600.0
    """A gain in speed is counted for so long, a loss of size that cannot be made good too."""
    slow_score: float = 1.2
    """From this score on a place may be called a straggler."""
    wait_s: float = 1800.0
    """How long to wait for a cluster that cannot hold the least size."""
    poll_s: float = 1.0
    """How long to wait before looking again."""
    flaky_faults: int = 3
    """A node with so many faults within `flaky_window_s`, and more than chance explains, gets nothing new."""
    flaky_window_s: float = 3600.0
    """For how long faults are held against a node."""
    spares: int = 0
    """Warm spares to keep; what there is beyond them may be used to grow."""

    def __post_init__(self) -> None:
        for name in ("spare_s", "cold_s", "move_s", "hold_s", "horizon_s", "wait_s", "flaky_window_s", "spares"):
            if getattr(self, name) < 0:
                raise ValueError(f"rules.{name} is {getattr(self, name)}; it must not be negative")
        if self.poll_s <= 0:
            raise ValueError(f"rules.poll_s is {self.poll_s}; it must be positive, or waiting would be a busy loop")
        if self.slow_score <= 1:
            raise ValueError(f"rules.slow_score is {self.slow_score}; it must exceed 1, the score of the median rank")
        if self.flaky_faults < 1:
            raise ValueError(f"rules.flaky_faults is {self.flaky_faults}; it must be at least 1")


@dataclass(frozen=True)
class ClusterState:
    """Everything a decision depends on.

    Attributes:
        now_s: the time.
        mesh: as it is, the lost ranks included.
        places, nodes: by rank: who sits there, on which node (id).
        bounds: (fewest, most) ranks the user allows.
        free: node id -> ranks that could start there now, besides all that the run holds. Seats of lost ranks whose
            node lives are not in it: they are still the run's.
        lost, slow, draining, spares: see their classes. Of `lost` only places of the mesh count.
        faulty: living places whose numbers were wrong, and likely will be again.
        disagree: the living hold different numbers, and nobody knows whose are right.
        covered: the living, those on draining nodes included, hold all of the state.
        shapes: unit shapes that model and memory allow, the preferred one first; the present one may be missing.
        most_dp: the sequences of a global batch: no replica may be without one.
        requested: what the user asked for last.
        history: faults that were dealt with.
        recoveries, max_failures: how often the run recovered from faults, and how often it may; -1 is any number.
        at_boundary: nobody is within a step.
        step_s: the median step.
        waiting_since_s: since when all stand still for want of seats.
        resized_s: when the mesh last changed by a decision.
        saved_s: when the newest checkpoint on disk was taken.
        left_s: how long the run will go on, estimated.

    Raises:
        ValueError: `places` or `nodes` do not fit the mesh, or the bounds are none.
    """

    now_s: float
    mesh: Mesh
    places: tuple[str, ...]
    nodes: tuple[str, ...]
    bounds: tuple[int, int]
    free: Mapping[str, int] = field(default_factory=dict)
    lost: tuple[Lost, ...] = ()
    slow: tuple[Slow, ...] = ()
    draining: tuple[Draining, ...] = ()
    spares: tuple[Spare, ...] = ()
    faulty: tuple[str, ...] = ()
    disagree: bool = False
    covered: bool = True
    shapes: tuple[Unit, ...] = ()
    most_dp: int = 2**31
    requested: Request | None = None
    history: tuple[Fault, ...] = ()
    recoveries: int = 0
    max_failures: int = -1
    at_boundary: bool = True
    step_s: float = 0.0
    waiting_since_s: float | None = None
    resized_s: float = -inf
    saved_s: float = -inf
    left_s: float = inf
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        if not len(self.places) == len(self.nodes) == self.mesh.size:
            raise ValueError(
                f"a mesh of {self.mesh.size} ranks needs a place and a node for each, "
                f"not {len(self.places)} places and {len(self.nodes)} nodes"
            )
        if not 1 <= self.bounds[0] <= self.bounds[1]:
            raise ValueError(f"bounds {self.bounds} must be (fewest, most) ranks, at least 1")


# ------------------------------------------------------------------------------------------------- what can be decided


@dataclass(frozen=True)
class Continue:
    """Go on as it is."""


@dataclass(frozen=True)
class Replace:
    """The seats of `places` go to others: all to warm spares, or some to processes that have to be started ("cold").

    `places` are the lost, those on draining nodes, stragglers, and living ones that must move along because a
    tensor-parallel group stays on one node. Those of them that live are sources of the move.
    """

    places: tuple[str, ...]
    source: Literal["spare", "cold"]


@dataclass(frozen=True)
class Shrink:
    """Give up `units` (positions on the dp axis) and go on with `dp` of them.

    The seats of `places`, in the units that stay, are filled by the living of the units given up, then by spares and,
    where `source` is "cold", by processes that have to be started.
    """

    dp: int
    units: tuple[int, ...] = ()
    places: tuple[str, ...] = ()
    source: Literal["spare", "cold"] = "spare"


@dataclass(frozen=True)
class Grow:
    """Add units, up to `dp` of them; the newcomers start while the others train."""

    dp: int


@dataclass(frozen=True)
class Reshape:
    """Go on as `mesh`: other units, and as many of them as there is room for."""

    mesh: Mesh


@dataclass(frozen=True)
class Rewind:
    """As `then`, but the living do not hold all of the state, or not the same: it comes from the newest checkpoint."""

    then: Replace | Shrink | Reshape | Continue


@dataclass(frozen=True)
class Save:
    """Write a checkpoint now: what is about to go cannot be moved, and the newest one is from before the notice, or
    older than `rules.horizon_s`."""


@dataclass(frozen=True)
class Wait:
    """Stand still and ask again after `seconds`."""

    seconds: float


@dataclass(frozen=True)
class Stop:
    """End the run."""

    why: str


Action: TypeAlias = Continue | Replace | Shrink | Grow | Reshape | Rewind | Save | Wait | Stop


@dataclass(frozen=True)
class Decision:
    """What to do, and why.

    Attributes:
        reason: one sentence for the journal; it names the cause.
        mesh: as it is once `action` is done.
        end: hung processes, to be ended before anything else.
        leave: places that have no seat afterwards whatever else becomes of the mesh, `end` included.
        avoid: nodes on which nothing new should be started.
    """

    action: Action
    reason: str
    mesh: Mesh
    end: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    avoid: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        """The action's name: "replace", "shrink", "wait", ..."""
        return type(self.action).__name__.lower()

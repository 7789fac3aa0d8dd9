"""Goodput of 10,000 ranks under published failure rates: recovery in place against restart from a checkpoint.

No processes: `raytron.actors.policy` itself decides, `raytron.actors.simulation` carries out, and this script adds what
it costs. Both ways decide by the same policy, on the same nodes, against the same faults; they differ in what carrying
out costs. Goodput is useful rank-seconds over all rank-seconds reserved, idle spare nodes included.

    python benchmarks/elastic_simulation.py [--quick] [--plot docs/images/elastic-goodput.png]

Published and used as they are:
- faults: 419 unexpected and 47 planned interruptions in 54 days on 16,384 GPUs, 58.7 % of the unexpected from GPUs
  (Llama 3, Meta 2024): one in 5.2 hours on 10,000 ranks, and multiples of that.
- a restart of everything 600 s, recovery of one replica beside the others 180 s (FT-HSDP, Meta, arXiv 2602.00277, at
  O(100K) GPUs). raytron's own time at this size has not been measured: 180 s is put in its place, and swept.
- saving blocks for 0.78 s and is on disk 67 s later (PyTorch's asynchronous checkpoints, 70B on 1,856 H200).
Assumed: a GPU's fault takes its node away, any other fault one process; a node is back after 4 hours; maintenance is
announced 30 minutes ahead; a cold process needs 60 s more; reading a checkpoint back takes 60 s; a step 10 s; a mesh of
125 units of pp 10 x tp 8 on nodes of 8; twins cost 2 % of every step (the bound they have to meet); the time between
saves is Young's, which is the best one, unless a case says otherwise.

Needs no quiet machine: nothing is timed.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from _common import ROOT, emit, parse, write_results

from raytron.actors.policy import Continue, Decision, Grow, Rewind, Rules, Save, Stop, Wait, decide, spares_to_start
from raytron.actors.simulation import SimulatedCluster
from raytron.parallel.mesh import Mesh

BENCHMARK = "elastic_simulation"
DAY, HOUR = 86400.0, 3600.0
MESH, PER_NODE = Mesh(dp=125, pp=10, tp=8), 8
FAULTS, PLANNED = 419 / 54 / 16384, 47 / 54 / 16384  # of a rank in a day
NODE_SHARE = 0.587
REPAIR_S, NOTICE_S = 4 * HOUR, 0.5 * HOUR
BLOCKED_S, WRITTEN_S = 0.78, 67.0
STEP_S, LOAD_S, COLD_S, TWINS = 10.0, 60.0, 60.0, 0.02
RATES = (1, 3, 10, 30)


@dataclass(frozen=True)
class Way:
    """How a run recovers, and what that costs.

    Attributes:
        stand_s: everyone stands still so long for any change.
        restart: every change ends all processes, and every fault goes back to the checkpoint.
        twins: every shard is on two nodes.
        warm, nodes: spare ranks kept warm, and spare nodes that are reserved.
        interval_s: between saves; Young's where None.
        rate: faults, as a multiple of the published ones.
    """

    name: str
    stand_s: float
    restart: bool = False
    twins: bool = False
    warm: int = 0
    nodes: int = 4
    interval_s: float | None = None
    rate: float = 1.0


RESTART = Way("restart", 600.0, restart=True)
IN_PLACE = Way("in place", 180.0)
TWIN = Way("in place, twins", 180.0, twins=True)
SPARE = Way("in place, twins, 16 warm spares", 180.0, twins=True, warm=16)


@dataclass
class Outcome:
    """Shares of all rank-seconds reserved, and how often what happened."""

    useful: float = 0.0
    lost: Counter = field(default_factory=Counter)
    events: Counter = field(default_factory=Counter)


class Run:
    """One run of a way over a trace of faults, from event to event."""

    def __init__(self, way: Way, seed: int, mesh: Mesh = MESH, per_node: int = PER_NODE) -> None:
        self.way, self.full = way, mesh.size
        count = math.ceil(mesh.size / per_node) + way.nodes
        start = 0.0 if way.restart else COLD_S
        rules = Rules(
            spare_s=way.stand_s,
            cold_s=way.stand_s + start,
            move_s=way.stand_s,
            horizon_s=REPAIR_S,
            wait_s=math.inf,
            spares=way.warm,
        )
        nodes = {f"node-{at}": per_node for at in range(count)}
        self.cluster = SimulatedCluster(mesh, nodes, (mesh.unit, mesh.size), rules)
        self.cluster.start_spares(way.warm)
        self.reserved, self.per_node, self.fresh = count * per_node, per_node, itertools.count(count)
        self.every_s = {"fault": DAY / (FAULTS * way.rate * self.full), "planned": DAY / (PLANNED * self.full)}
        self.interval_s = way.interval_s or max(WRITTEN_S, math.sqrt(2 * BLOCKED_S * self.every_s["fault"]))
        self.chance = {kind: random.Random(f"{seed} {kind}") for kind in self.every_s}  # the same faults for every way
        self.insured = BLOCKED_S / self.interval_s + TWINS * way.twins
        self.position = self.saved = self.busy_until = self.now = 0.0  # seconds; the first two of computing
        self.outcome, self.queue, self.order = Outcome(), [], itertools.count()

    def over(self, seconds: float) -> Outcome:
        """Run for so long."""
        for kind in self.every_s:
            self._next(kind)
        while self.queue and self.queue[0][0] <= seconds:
            at, _, kind, node = heapq.heappop(self.queue)
            self._advance(at)
            self._happen(kind, node)
            self._ask()
        self._advance(seconds)
        whole = seconds * self.reserved
        self.outcome.useful /= whole
        self.outcome.lost = Counter({cause: lost / whole for cause, lost in self.outcome.lost.items()})
        return self.outcome

    def _at(self, time: float, kind: str, node: str = "") -> None:
        heapq.heappush(self.queue, (time, next(self.order), kind, node))

    def _next(self, kind: str) -> None:
        self._at(self.now + self.chance[kind].expovariate(1 / self.every_s[kind]), kind)

    def _advance(self, time: float) -> None:
        """Let time pass: standing still first, then computing, if there is a whole mesh."""
        span, lost, size = time - self.now, self.outcome.lost, self.cluster.mesh.size
        still = span if self.cluster.lost else min(span, max(0.0, self.busy_until - self.now))
        computing = span - still
        lost["spare nodes"] += span * (self.reserved - self.full)
        lost["standing still"] += still * self.full
        lost["fewer ranks"] += computing * (self.full - size)
        lost["saving and twins"] += computing * size * self.insured
        self.outcome.useful += computing * size * (1 - self.insured)
        self.position += computing
        self.saved = max(self.saved, (self.position - WRITTEN_S) // self.interval_s * self.interval_s)
        self.now = self.cluster.now_s = time

    def _happen(self, kind: str, node: str) -> None:
        cluster, events = self.cluster, self.outcome.events
        if kind in self.every_s:
            self._next(kind)
            where, which, what = (self.chance[kind].random() for _ in range(3))
            node = at(where, sorted(cluster.capacity)) or ""
            events[kind] += 1
        if kind == "planned" and node:
            cluster.drain(node, NOTICE_S)
            self._at(self.now + NOTICE_S, "gone", node)
        elif kind == "fault" and what >= NODE_SHARE:
            place = at(which, [place for place, there in cluster.seated if there == node])
            cluster.lose({place}, "died")
        elif (kind == "fault" or kind == "gone") and node in cluster.capacity:
            cluster.lose_node(node)
            self._at(self.now + REPAIR_S, "back")
        elif kind == "back":
            cluster.add_node(f"node-{next(self.fresh)}", self.per_node)

    def _ask(self) -> None:
        """Ask the policy and do what it says, until there is nothing to do now."""
        if not self.cluster.lost and self.now < self.busy_until:
            return
        decision = decide(self.cluster.state(covered=self._covered(), step_s=STEP_S))
        while not isinstance(decision.action, Continue | Save | Wait | Stop):
            fault = bool(self.cluster.lost)
            self._pay(decision)
            self.cluster.carry_out(decision)
            if fault and self.way.restart:
                self._grow_with_it()
            decision = decide(self.cluster.state(step_s=STEP_S))
        self.cluster.spares = self.cluster.spares[: self.way.warm]  # who else has no seat is ended
        self.cluster.start_spares(spares_to_start(self.cluster.state()))
        if isinstance(decision.action, Stop):
            raise RuntimeError(decision.reason)
        if self.busy_until > self.now:
            self._at(self.busy_until + self.cluster.rules.hold_s, "look")

    def _grow_with_it(self) -> None:
        """A restart takes whatever nodes there are: growing along with it costs nothing more."""
        free = replace(self.cluster.rules, move_s=0.0)
        decision = decide(self.cluster.state(resized_s=-math.inf, history=(), rules=free))
        if isinstance(decision.action, Grow):
            self.cluster.carry_out(decision)

    def _pay(self, decision: Decision) -> None:
        way, fault = self.way, bool(self.cluster.lost)
        action = decision.action.then if isinstance(decision.action, Rewind) else decision.action
        self.outcome.events[type(action).__name__.lower()] += 1
        stand = way.stand_s
        if not way.restart and fault and getattr(action, "source", "") == "cold":
            stand += COLD_S
        back = STEP_S / 2 if fault else 0.0
        if isinstance(decision.action, Rewind):
            self.outcome.events["rewound"] += 1
            stand += 0.0 if way.restart else LOAD_S
            back = self.position - self.saved
        back = min(back, self.position)
        redone = back * self.cluster.mesh.size * (1 - self.insured)
        self.position -= back
        self.outcome.useful -= redone
        self.outcome.lost["done again"] += redone
        self.busy_until = self.now + stand

    def _covered(self) -> bool:
        """Whether every lost shard has its twin: ranks i and i + dp / 2 of the same position in their units."""
        gone = {one.place for one in self.cluster.lost}
        if not gone:
            return True
        if self.way.restart or not self.way.twins:
            return False
        mesh = self.cluster.mesh
        lost = {rank for rank, (place, _) in enumerate(self.cluster.seated) if place in gone}
        return not any((rank + mesh.dp // 2 * mesh.unit) % mesh.size in lost for rank in lost)


def at(share: float, things: Sequence[str]) -> str | None:
    """The one that is so far along; None of none."""
    return things[int(share * len(things))] if things else None


def measure(way: Way, seeds: Iterable[int], faults: int) -> Outcome:
    """The mean over seeds of runs long enough for so many faults."""
    seconds = faults * DAY / (FAULTS * way.rate * MESH.size)
    outcomes = [Run(way, seed).over(seconds) for seed in seeds]
    mean = Outcome(sum(one.useful for one in outcomes) / len(outcomes))
    for one in outcomes:
        mean.lost.update({cause: lost / len(outcomes) for cause, lost in one.lost.items()})
        mean.events.update(one.events)
    print(f"{way}: {mean.useful:.4f}", file=sys.stderr, flush=True)
    return mean


def row(case: str, way: Way, ours: Outcome, peer: Outcome | None) -> dict:
    """One line; a ratio of the shares that are lost would flatter, so it is of goodput."""
    details = {"standing still for a change": f"{way.stand_s:g} s", "faults a day": FAULTS * way.rate * MESH.size}
    details |= {f"lost: {cause}": round(share, 5) for cause, share in ours.lost.most_common() if share > 5e-6}
    details |= dict(ours.events)
    name = "restart from a checkpoint, same policy and nodes" if peer else None
    return emit(BENCHMARK, case, ours.useful, peer and peer.useful, name, unit="goodput", details=details)


def sweep_rates(seeds: Sequence[int], faults: int, rates: Sequence[float]) -> tuple[list[dict], dict]:
    """All ways at several failure rates."""
    rows, curves = [], {way.name: [] for way in (RESTART, IN_PLACE, TWIN, SPARE)}
    for rate in rates:
        peer = measure(replace(RESTART, rate=rate), seeds, faults)
        curves[RESTART.name].append(peer.useful)
        for way in (IN_PLACE, TWIN, SPARE):
            ours = measure(replace(way, rate=rate), seeds, faults)
            curves[way.name].append(ours.useful)
            rows.append(row(f"{rate:g}x published rate: {way.name}", replace(way, rate=rate), ours, peer))
    return rows, curves


def sweep_times(
    seeds: Sequence[int], faults: int, times: Sequence[float], rate: float
) -> tuple[list[dict], list[float]]:
    """What the time of a recovery does: raytron's at this size is not known."""
    ways = [replace(TWIN, stand_s=time, rate=rate) for time in times]
    outcomes = [measure(way, seeds, faults) for way in ways]
    names = [f"{rate:g}x, twins, a change takes {way.stand_s:g} s" for way in ways]
    rows = [row(name, way, ours, None) for name, way, ours in zip(names, ways, outcomes, strict=True)]
    return rows, [one.useful for one in outcomes]


def sweep_intervals(seeds: Sequence[int], faults: int, minutes: Sequence[float]) -> list[dict]:
    """What rarer checkpoints do."""
    rows = []
    for interval in minutes:
        restart, plain, twins = (
            measure(replace(way, interval_s=60 * interval), seeds, faults) for way in (RESTART, IN_PLACE, TWIN)
        )
        for way, ours in ((IN_PLACE, plain), (TWIN, twins)):
            rows.append(row(f"1x, saved every {interval:g} min: {way.name}", way, ours, restart))
    return rows


def sweep_spares(seeds: Sequence[int], faults: int, nodes: Sequence[int], rate: float) -> list[dict]:
    """What spare nodes do."""
    rows = []
    for count in nodes:
        way = replace(TWIN, nodes=count, rate=rate)
        restart = measure(replace(RESTART, nodes=count, rate=rate), seeds, faults)
        rows.append(row(f"{rate:g}x, {count} spare nodes: {way.name}", way, measure(way, seeds, faults), restart))
    return rows


def plot(path: Path, rates: Sequence[float], curves: dict, times: Sequence[float], by_time: Sequence[float]) -> None:
    """Goodput over the failure rate, and over the time that a recovery takes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    daily = [FAULTS * rate * MESH.size for rate in rates]
    for name, values in curves.items():
        left.plot(daily, values, "o-" if name != RESTART.name else "s--", label=name)
    left.set(
        xscale="log", xlabel="faults a day, 10,000 ranks", ylabel="goodput", title="600 s a restart, 180 s in place"
    )
    left.legend()
    at = rates.index(10)
    right.plot(times, by_time, "o-", color="C2", label=f"in place, twins, {daily[at]:.0f} faults a day")
    right.axhline(curves[RESTART.name][at], color="C0", linestyle="--", label="restart, 600 s")
    right.set(
        xscale="log", xlabel="seconds that a recovery in place takes", title="if a recovery took longer or shorter"
    )
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def main() -> None:
    arguments = parse(__doc__.splitlines()[0], ["--force", *sys.argv[1:]], plot="", faults=60, seeds=2)
    seeds, faults = range(1 if arguments.quick else arguments.seeds), 20 if arguments.quick else arguments.faults
    rates, times = (
        (1, 10) if arguments.quick else RATES,
        (2.0, 60.0, 600.0) if arguments.quick else (2, 10, 60, 180, 600),
    )
    rows, curves = sweep_rates(seeds, faults, rates)
    more, by_time = sweep_times(seeds, faults, times, rate=10)
    rows += more
    if not arguments.quick:
        rows += sweep_intervals(seeds, faults, (10, 60))
        rows += sweep_spares(seeds, faults, (0, 16), rate=10)
    if arguments.plot:
        plot(Path(arguments.plot), rates, curves, times, by_time)
    if arguments.output or not arguments.quick:
        notes = __doc__.partition("Published and used")[2].partition("Needs no quiet")[0]
        notes = f"Simulated, not measured. Published and used{notes}"
        write_results(arguments.output or ROOT / "benchmarks" / "results" / f"{BENCHMARK}.md", rows, notes=notes)


if __name__ == "__main__":
    main()

"""A pipeline schedule on a clock: is it sound, how long does it take, what does it look like.

`simulate` runs the lists of schedules.py with given times instead of tensors. It knows nothing of the generators, so it
checks them against the closed formulas of the papers (Narayanan et al. 2021; Qi et al. 2024), and it answers what those
can't: uneven counts, the price of communication, a schedule of one's own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from raytron.parallel.schedules import Action, Message, Schedule, consumes, produces, virtual_stages

__all__ = ["Simulation", "draw", "simulate", "validate"]


@dataclass(frozen=True)
class Simulation:
    """A schedule on a clock.

    Attributes:
        plan: the schedule.
        start, end: per rank, per action, in the unit of the costs.
        makespan: end of the last action.
        bubble: idle share of all ranks' time until then, in [0, 1).
        peak: per rank, the most (micro-batch, chunk) activations alive at once: from F until B, or until W where split.
    """

    plan: Schedule
    start: tuple[tuple[float, ...], ...]
    end: tuple[tuple[float, ...], ...]
    makespan: float
    bubble: float
    peak: tuple[int, ...]


def simulate(
    plan: Schedule,
    forward: float = 1.0,
    backward: float = 2.0,
    input: float = 1.0,
    weight: float = 1.0,
    communication: float = 0.0,
) -> Simulation:
    """Time `plan` when all stages are equal.

    Args:
        forward, backward, input, weight: time of F, B, I, W of one micro-batch through all chunks of a rank; a chunk
            takes its share, so schedules with different `virtual` compare.
        communication: time from the end of an action to the arrival of its message at another rank; occupies nobody.

    Raises:
        ValueError: the schedule deadlocks; names the actions that wait.
    """
    stages, virtual = len(plan), virtual_stages(plan)
    cost = {"F": forward / virtual, "B": backward / virtual, "I": input / virtual, "W": weight / virtual}
    arrival: dict[Message, float] = {}
    start: list[list[float]] = [[] for _ in plan]
    end: list[list[float]] = [[] for _ in plan]

    def advance(rank: int) -> bool:
        """Run `rank` until it waits for a message nobody has sent yet."""
        before = len(end[rank])
        for action in plan[rank][before:]:
            needed = consumes(action, rank, stages, virtual)
            if needed is not None and needed not in arrival:
                break
            free = end[rank][-1] if end[rank] else 0.0
            start[rank].append(max(free, arrival[needed]) if needed is not None else free)
            end[rank].append(start[rank][-1] + cost[action.kind])
            if (sent := produces(action, rank, stages, virtual)) is not None:
                arrival[sent] = end[rank][-1] + (communication if sent.target != rank else 0.0)
        return len(end[rank]) > before

    while sum(advance(rank) for rank in range(stages)):
        pass
    if stuck := [f"rank {r} at {plan[r][len(end[r])]}" for r in range(stages) if len(end[r]) < len(plan[r])]:
        raise ValueError(f"pipeline schedule deadlocks: {', '.join(stuck)}; mend the order of these actions")
    makespan = max(times[-1] for times in end)
    work = sum(cost[action.kind] for actions in plan for action in actions)
    # Clipped: sums of thirds and the like may pass the makespan by a rounding.
    bubble = max(0.0, 1 - work / (stages * makespan)) if makespan else 0.0
    peak = tuple(_peak(actions) for actions in plan)
    return Simulation(plan, tuple(map(tuple, start)), tuple(map(tuple, end)), makespan, bubble, peak)


def _peak(actions: tuple[Action, ...]) -> int:
    alive = peak = 0
    for action in actions:
        alive += {"F": 1, "I": 0}.get(action.kind, -1)
        peak = max(peak, alive)
    return peak


def validate(plan: Schedule) -> None:
    """Check that `plan` computes every gradient once and runs through.

    Every rank runs, on each of the same (micro, chunk) pairs, F and later either B or I and later W.

    Raises:
        ValueError: names the rank and the (micro, chunk) at fault, or the actions of a deadlock.
    """
    items = {(action.micro, action.chunk) for actions in plan for action in actions}
    for rank, actions in enumerate(plan):
        done: dict[tuple[int, int], str] = dict.fromkeys(items, "")
        for action in actions:
            done[action.micro, action.chunk] += action.kind
        for (micro, chunk), kinds in sorted(done.items()):
            if kinds not in ("FB", "FIW"):
                raise ValueError(
                    f"pipeline schedule: rank {rank} runs {kinds or 'nothing'} on micro-batch {micro}, chunk {chunk}; "
                    "it must run F then B, or F, I and W, in this order"
                )
    simulate(plan)


_COLOURS = {"F": (0.36, 0.55, 0.85), "B": (0.93, 0.60, 0.25), "I": (0.95, 0.75, 0.30), "W": (0.42, 0.70, 0.45)}
_NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def draw(simulation: Simulation, path: str | Path, title: str = "") -> Path:
    """Draw `simulation` as a PNG at `path` and return it: a row per rank, a box per action, later chunks paler."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    plan, virtual = simulation.plan, virtual_stages(simulation.plan)
    width = min(40.0, max(8.0, 0.16 * max(map(len, plan))))
    figure = Figure(figsize=(width, 1.5 + 0.34 * len(plan)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    inches = width / simulation.makespan
    for rank, actions in enumerate(plan):
        for action, start, end in zip(actions, simulation.start[rank], simulation.end[rank], strict=True):
            colour = tuple(c + (1 - c) * 0.6 * action.chunk / virtual for c in _COLOURS[action.kind])
            axes.broken_barh([(start, end - start)], (rank - 0.45, 0.9), facecolors=[colour], edgecolor="white", lw=0.6)
            if (end - start) * inches > 0.1:  # room for the number
                centre = ((start + end) / 2, rank)
                axes.text(*centre, str(action.micro), ha="center", va="center", fontsize=6, clip_on=True)
    count = 1 + max(action.micro for action in plan[0])
    sizes = f"{len(plan)} ranks, {count} micro-batches" + (f", {virtual} chunks a rank" if virtual > 1 else "")
    axes.set_title(f"{title + ': ' if title else ''}{sizes}, bubble {simulation.bubble:.1%}", fontsize=10)
    axes.set(xlim=(0, simulation.makespan), ylim=(len(plan) - 0.5, -0.5), yticks=range(len(plan)), xlabel="time")
    axes.set_yticklabels([f"rank {rank}" for rank in range(len(plan))], fontsize=8)
    kinds = sorted({action.kind for actions in plan for action in actions}, key="FBIW".index)
    patches = [Patch(color=_COLOURS[kind], label=_NAMES[kind]) for kind in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(kinds), fontsize=8, frameon=False)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)
    return path

"""What another process says to a live run, and hears from it: `raytron status`, `scale`, `reshape` and `chaos`.

A run is named by its folder (`runs/NAME`, where its cluster's address is kept) or, in the cluster of `RAY_ADDRESS`, by
its name alone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._raylet import Config
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytron.actors.control import CLUSTER
from raytron.actors.journal import JOURNAL, UNTOLD, read_journal
from raytron.actors.mailbox import NAMESPACE, find_mailbox
from raytron.metrics import goodput, status_page
from raytron.metrics.accounting import KINDS

__all__ = ["ask", "chaos", "describe", "following", "last_words", "spent", "status", "talking_to", "write_page"]

ANSWER_S = 60.0  # a driver looks at its requests between steps
UNSAID = ("time", "event", "reason", "what", "step_s", "since_s", "useful_s", "sources", "run", "steps", "setup")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def folder_of(run: str) -> Path | None:
    """The folder of the run, if it is on this machine."""
    return next((path for path in (Path(run), Path("runs") / run) if (path / CLUSTER).is_file()), None)


@contextmanager
def talking_to(run: str) -> Iterator[Any]:
    """The live run's mailbox, connected to its cluster for the length of the block.

    Raises:
        ValueError: it is not alive, or it is not known where it is.
    """
    folder = folder_of(run)
    if folder is None and not os.environ.get("RAY_ADDRESS"):
        raise ValueError(f"no folder {run} or runs/{run} of a run; give its folder, or set RAY_ADDRESS to its cluster")
    where = json.loads((folder / CLUSTER).read_text()) if folder else {}
    name = folder.resolve().name if folder else run
    if where.get("auth_mode") and "RAY_AUTH_MODE" not in os.environ:
        # Ray guards a cluster that a driver starts for itself with the user's token, but uses the token for an address
        # only where this variable was set before Ray was imported.
        os.environ["RAY_AUTH_MODE"] = where["auth_mode"]
        Config.initialize("")
    try:
        ray.init(where.get("address"), namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise ValueError(
            f"run {name!r} is not alive: there is no cluster at {where.get('address')} any more"
        ) from error
    try:
        yield find_mailbox(name)
    finally:
        ray.shutdown()


def ask(mailbox: Any, request: Mapping[str, Any], wait_s: float = ANSWER_S) -> str:
    """Leave a request with a run, and what became of it, in words.

    Raises:
        ValueError: it is refused, with the reason.
    """
    number = ray.get(mailbox.ask.remote(dict(request)))
    deadline = time.monotonic() + wait_s
    while (answer := ray.get(mailbox.answer.remote(number))) is None:
        if time.monotonic() > deadline:
            return "asked; the run has not looked at it yet, which it does between steps"
        time.sleep(0.2)
    if answer:
        raise ValueError(answer)
    return "the run has taken it on, and changes at a step boundary as soon as there is room; `raytron status` tells"


def status(mailbox: Any) -> dict[str, Any]:
    """The run's, as of a second ago."""
    return ray.get(mailbox.status.remote())


def following(mailbox: Any, every_s: float) -> Iterator[dict[str, Any]]:
    """The run's status every `every_s` seconds until it is over."""
    while True:
        try:
            state = status(mailbox)
        except ray.exceptions.RayActorError:
            return
        yield state
        time.sleep(every_s)


def events_of(run: str, state: Mapping[str, Any] | None = None) -> list[Mapping[str, Any]]:
    """The journal of the run, and what `state`, its status, says of now. Of a run whose folder is not here only the
    last events are known."""
    folder = folder_of(run)
    events: list[Mapping[str, Any]] = read_journal(folder / JOURNAL) if folder else []
    if state and state.get("ranks"):
        if not events:
            events = [{"time": state["time"] - state["wall_s"], "event": "began", "run": state["run"]}]
            events += [_seated(state, events[0]["time"]), *state["events"]]
        now = {name: state[name] for name in ("time", "step", "steps", "useful_s")}
        events.append({"event": "now", **now})
    return events


def _seated(state: Mapping[str, Any], at: float) -> dict[str, Any]:
    """A status as the journal tells of seats (`Control.seated`)."""
    hosts = {rank["node"]: rank["host"] for rank in state["ranks"]}
    rows = [(rank["rank"], [rank["place"], list(hosts).index(rank["node"])]) for rank in state["ranks"]]
    told = {"generation": state["generation"], "mesh": state["mesh"], "nodes": [*map(list, hosts.items())]}
    seats = {
        "ranks": [row for rank, row in rows if rank is not None],
        "spares": [r for rank, r in rows if rank is None],
    }
    return {"time": at, "event": "seated", **told, **seats}


def write_page(
    run: str, path: str | Path, state: Mapping[str, Any] | None = None, refresh_s: int | None = None
) -> None:
    """Write the page of a run (`metrics.status_page`), alive if there is a `state` of it.

    Raises:
        ValueError: nothing is known of the run.
    """
    events = events_of(run, state)
    if not events:
        raise ValueError(f"there is no journal in {run} or runs/{run}; give the folder of a run")
    name = next((event["run"] for event in events if "run" in event), Path(run).absolute().name)
    status_page(events, path, name, refresh_s)


def spent(events: list[Mapping[str, Any]]) -> str:
    """What the time of a run was spent on, in a line."""
    account = goodput(events)
    lost = {KINDS[kind]: seconds for kind, seconds in account.seconds.items() if kind != "useful" and seconds >= 0.05}
    told = ", ".join(f"{seconds:.1f} s {what}" for what, seconds in sorted(lost.items(), key=lambda one: -one[1]))
    return f"{account.seconds.get('useful', 0.0):.1f} of {account.wall_s:.1f} s were steps that count; {told}"


def describe(state: Mapping[str, Any]) -> str:
    """A status in words and lines."""
    if not state.get("ranks"):
        return f"{state.get('run')}: starting"
    dp, pp, _, tp = state["mesh"]
    nodes = {rank["node"] for rank in state["ranks"]}
    lines = [
        f"{state['run']}: step {state['step']} of {state['steps']}, {state.get('step_time_s', 0):.3g} s each; "
        f"up for {state['wall_s']:.0f} s, goodput {100 * state['goodput']:.1f} %, {state['recoveries']} recoveries",
        f"dp {dp} x pp {pp} x tp {tp} on {len(nodes)} nodes, generation {state['generation']}",
    ]
    for rank in state["ranks"]:
        who = "spare" if rank["rank"] is None else f"rank {rank['rank']}"
        lines.append(f"  {who:8} {rank['place']:10} {rank['host']} node {rank['node'][:8]} pid {rank['pid']}")
    lines += [_engine(engine) for engine in state.get("engines", ())]
    return "\n".join([*lines, *told(state["events"])])


def _engine(row: Mapping[str, Any]) -> str:
    """A rollout engine in a line."""
    where = f"{row['host']} node {row['node'][:8]} pid {row['pid']}" if "node" in row else "no seat yet"
    weights = "no weights yet" if row["version"] is None else f"version {row['version']}"
    work = f"{row['requests']} requests, {row['outstanding_tokens']:,} tokens at most"
    return f"  engine {row['engine']:<3} {row['state']:8} {where}, {weights}, {work}"


def told(events: list[Mapping[str, Any]]) -> list[str]:
    """Journal entries as lines."""
    lines = []
    for event in events:
        clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        rest = {key: value for key, value in event.items() if key not in UNSAID and value != ""}
        words = event.get("reason") or event.get("what") or ""
        lines.append(f"{clock} {event['event']}: {words} {' '.join(f'{k} {v}' for k, v in rest.items())}".rstrip())
    return lines


def last_words(run: str) -> str:
    """What the journal of a run that is not alive says."""
    events = events_of(run)
    shown = [event for event in events if event["event"] not in UNTOLD][-20:]
    return "\n".join([*told(shown), spent(events)]) if events else "nothing is known of it"


def chaos(
    mailbox: Any, every_s: float, how: str, seed: int | None, say: Callable[[str], None], most: int | None = None
) -> int:
    """End or stop a random rank or rollout engine of the run every `every_s` seconds, until it is over or `most` were;
    how many were."""
    choice, count = random.Random(seed), 0
    while most is None or count < most:
        time.sleep(every_s)
        try:
            victims = _victims(status(mailbox))
        except ray.exceptions.RayActorError:
            break
        if victims:
            who, victim = choice.choice(victims)
            _send(victim["node"], victim["pid"], SIGNALS[how])
            count += 1
            say(f"{SIGNALS[how].name} to {who}, pid {victim['pid']} on {victim['host']}")
    return count


def _victims(state: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Processes that the run should outlive, with what they are called."""
    ranks = [(f"rank {rank['rank']}", rank) for rank in state.get("ranks", ()) if rank["rank"] is not None]
    engines = [(f"engine {engine['engine']}", engine) for engine in state.get("engines", ()) if "pid" in engine]
    return ranks + engines


def _send(node: str, pid: int, number: int) -> None:
    """Send the signal there: a pid means something on its own node only."""

    @ray.remote(num_cpus=0, max_retries=0)
    def send() -> None:
        import os

        os.kill(pid, number)

    here = NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        ray.get(send.options(scheduling_strategy=here).remote(), timeout=30)
    except (ray.exceptions.RayError, TimeoutError):  # it, or its node, went meanwhile
        return

"""Pipeline schedules as data: who computes what in which order, and what travels between ranks.

A schedule is one list of actions per pipeline rank and nothing else. Everything the executor (pipeline.py) needs is a
pure function of it: `messages` gives the order in which tensors cross each ordered pair of ranks, `program` one rank's
steps with the receives to post before each. So a schedule is checked, timed and drawn (simulation.py) before anything
runs, and a new one is a function that returns lists. Chunk c of rank r is global stage c * stages + r: virtual stages
interleave.

Sources: GPipe (Huang et al. 2019); 1F1B (Narayanan et al. 2019); interleaving (Narayanan et al. 2021, Megatron-LM);
ZB-H1, which splits the backward pass into an input gradient I that the previous stage waits for and a weight gradient W
that nobody waits for, and fills the bubble with W (Qi et al. 2024). Rejected: an executor per schedule, as in
Megatron-LM, where the order of communication is woven into the control flow and can't be looked at before it runs.

Every schedule takes the micro-batches of a chunk in ascending order, forward and backward. A chunk's gradients are thus
summed in one order, and all schedules give the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice, pairwise
from typing import NamedTuple

__all__ = [
    "SCHEDULES",
    "Action",
    "Message",
    "Schedule",
    "Step",
    "consumes",
    "forward_only",
    "messages",
    "produces",
    "program",
    "schedule",
    "virtual_stages",
]


class Action(NamedTuple):
    """One unit of work of a rank.

    kind: "F" forward, "B" whole backward, "I" backward of inputs only, "W" the weight gradients an "I" left behind.
    micro: micro-batch. chunk: which of the rank's chunks of layers.
    """

    kind: str
    micro: int
    chunk: int


Schedule = tuple[tuple[Action, ...], ...]


class Message(NamedTuple):
    """A tensor on its way to `chunk` of rank `target`.

    kind: "activation", which the chunk starts from, or "gradient", that of the chunk's output.
    """

    source: int
    target: int
    kind: str
    micro: int
    chunk: int


class Step(NamedTuple):
    """An action with its messages, as one rank runs it.

    post: receives to start before the action, its own and the next one's, each source in its order of sending.
    receive, send: what the action waits for and what it produces; source and target may be the same rank.
    last: this completes the gradients of the action's chunk.
    """

    action: Action
    post: tuple[Message, ...]
    receive: Message | None
    send: Message | None
    last: bool


def _rounds(stages: int, micro_batches: int, virtual: int, *, reverse: bool = False) -> list[tuple[int, int]]:
    """(micro, chunk) in interleaved order: a round of micro-batches goes through one chunk, then through the next.

    Megatron-LM's rounds have exactly `stages` micro-batches. Here a remainder is spread over the rounds, which keeps
    the bubble of a divisible count; a short last round would stall every rank.
    """
    count = max(1, micro_batches // stages)
    bounds = [micro_batches * i // count for i in range(count + 1)]
    chunks = range(virtual)[:: -1 if reverse else 1]
    return [(micro, chunk) for low, high in pairwise(bounds) for chunk in chunks for micro in range(low, high)]


def _gpipe(stages: int, micro_batches: int, virtual: int) -> Schedule:
    forwards = tuple(Action("F", micro, chunk) for chunk in range(virtual) for micro in range(micro_batches))
    backwards = tuple(Action("B", micro, chunk) for chunk in reversed(range(virtual)) for micro in range(micro_batches))
    return (forwards + backwards,) * stages


def _alternating(stages: int, micro_batches: int, virtual: int, *, lead: int, split: bool) -> Schedule:
    """Warm up, then one forward and one backward in turn, then drain.

    Each rank runs `lead` more forwards ahead than the next. With `split`, rank r holds back r weight gradients: its
    spare room for activations below rank 0's peak, and just what keeps it busy while the gradients drain.
    """
    forwards = [Action("F", *item) for item in _rounds(stages, micro_batches, virtual)]
    backwards = _rounds(stages, micro_batches, virtual, reverse=True)
    largest_round = -(-micro_batches // max(1, micro_batches // stages))

    def rank_actions(rank: int) -> tuple[Action, ...]:
        warmup = min(lead * (stages - 1 - rank) + (virtual - 1) * largest_round, len(forwards))
        actions = forwards[:warmup]
        ahead = iter(forwards[warmup:])
        for i, item in enumerate(backwards):
            actions += islice(ahead, 1)
            actions.append(Action("I" if split else "B", *item))
            if split and i >= rank:
                actions.append(Action("W", *backwards[i - rank]))
        if split:
            actions += [Action("W", *item) for item in backwards[max(0, len(backwards) - rank) :]]
        return tuple(actions)

    return tuple(rank_actions(rank) for rank in range(stages))


def _one_forward_one_backward(stages: int, micro_batches: int, virtual: int) -> Schedule:
    return _alternating(stages, micro_batches, virtual, lead=1 if virtual == 1 else 2, split=False)


def _interleaved(stages: int, micro_batches: int, virtual: int) -> Schedule:
    if virtual < 2:
        raise ValueError(
            'schedule "interleaved-1f1b" needs virtual >= 2, got 1: raise virtual or choose "1f1b", which is the same '
            "without virtual stages"
        )
    return _one_forward_one_backward(stages, micro_batches, virtual)


def _zero_bubble(stages: int, micro_batches: int, virtual: int) -> Schedule:
    return _alternating(stages, micro_batches, virtual, lead=1, split=True)


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "interleaved-1f1b": _interleaved,
    "zero-bubble": _zero_bubble,
}


def schedule(name: str, stages: int, micro_batches: int, virtual: int = 1) -> Schedule:
    """The schedule `name` (a key of `SCHEDULES`): one tuple of actions per pipeline rank.

    With m micro-batches, p stages, v chunks a rank, F, I, W the times of all of a rank's chunks for one micro-batch and
    B = I + W, when m >= p:

    | name             | idle time of a rank | chunk activations held at most by rank r |
    |------------------|---------------------|------------------------------------------|
    | gpipe            | (p-1)(F+B)/v        | m v                                      |
    | 1f1b             | (p-1)(F+B)          | p - r                                    |
    | interleaved-1f1b | (p-1)(F+B)/v        | 2(p-1-r) + (v-1)g + 1                    |
    | zero-bubble      | (p-1)(F+I-W)/v      | p + (v-1)g, with W <= F and W <= I       |

    A round g is p micro-batches, or p plus a share of the remainder when p does not divide m. "1f1b" with virtual > 1
    is "interleaved-1f1b".

    Args:
        stages: pipeline ranks. micro_batches: micro-batches of a step. virtual: chunks of layers on each rank.

    Raises:
        ValueError: unknown name, a size below 1, or "interleaved-1f1b" with virtual 1.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown pipeline schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    for what, value in (("stages", stages), ("micro_batches", micro_batches), ("virtual", virtual)):
        if value < 1:
            raise ValueError(f"pipeline schedule {name!r} got {what} = {value}; it must be at least 1")
    return SCHEDULES[name](stages, micro_batches, virtual)


def forward_only(plan: Schedule) -> Schedule:
    """The forwards of `plan` in their order, for evaluation. They wait for forwards only, so they still run through."""
    return tuple(tuple(action for action in actions if action.kind == "F") for actions in plan)


def virtual_stages(plan: Schedule) -> int:
    """Chunks of layers on each rank."""
    return 1 + max(action.chunk for actions in plan for action in actions)


def consumes(action: Action, rank: int, stages: int, virtual: int) -> Message | None:
    """The message `action` waits for, if any."""
    if action.kind == "W":
        return None
    stage = action.chunk * stages + rank
    neighbour = stage - 1 if action.kind == "F" else stage + 1
    if not 0 <= neighbour < stages * virtual:
        return None
    kind = "activation" if action.kind == "F" else "gradient"
    return Message(neighbour % stages, rank, kind, action.micro, action.chunk)


def produces(action: Action, rank: int, stages: int, virtual: int) -> Message | None:
    """The message `action` sends, if any."""
    if action.kind == "W":
        return None
    stage = action.chunk * stages + rank
    neighbour = stage + 1 if action.kind == "F" else stage - 1
    if not 0 <= neighbour < stages * virtual:
        return None
    chunk, target = divmod(neighbour, stages)
    return Message(rank, target, "activation" if action.kind == "F" else "gradient", action.micro, chunk)


def messages(plan: Schedule) -> dict[tuple[int, int], tuple[Message, ...]]:
    """(source, target) -> what travels between these two ranks, in order of production.

    Point-to-point messages carry no tags: the receiver posts its receives in exactly this order. With two ranks and
    virtual stages, activations and gradients share both directions.
    """
    stages, virtual = len(plan), virtual_stages(plan)
    lines: dict[tuple[int, int], list[Message]] = {}
    for rank, actions in enumerate(plan):
        for action in actions:
            message = produces(action, rank, stages, virtual)
            if message is not None and message.target != rank:
                lines.setdefault((rank, message.target), []).append(message)
    return {pair: tuple(line) for pair, line in sorted(lines.items())}


def program(plan: Schedule, rank: int) -> tuple[Step, ...]:
    """The steps of `rank`. Receives are posted one action ahead, so that a transfer overlaps the action before it.

    A message posted only because it stands before a wanted one in its line is kept until its own action comes.
    """
    stages, virtual, actions = len(plan), virtual_stages(plan), plan[rank]
    lines = {source: deque(line) for (source, target), line in messages(plan).items() if target == rank}
    posted: set[Message] = set()
    final = {action.chunk: i for i, action in enumerate(actions) if action.kind in "BW"}
    received = [consumes(action, rank, stages, virtual) for action in actions]

    def post_through(wanted: Message) -> list[Message]:
        post: list[Message] = []
        while wanted not in posted:
            post.append(lines[wanted.source].popleft())
            posted.add(post[-1])
        return post

    steps = []
    for i, action in enumerate(actions):
        soon = [message for message in received[i : i + 2] if message is not None and message.source != rank]
        post = [message for wanted in soon for message in post_through(wanted)]
        send = produces(action, rank, stages, virtual)
        steps.append(Step(action, tuple(post), received[i], send, final.get(action.chunk) == i))
    return tuple(steps)

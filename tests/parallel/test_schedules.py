"""Schedules: sound for every size, as fast and as small as their papers say, and in step with FIFO channels."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.parallel.schedules import SCHEDULES, Action, forward_only, messages, program, schedule
from raytron.parallel.simulation import draw, simulate, validate

quick = settings(deadline=None, max_examples=60)
sizes = st.tuples(st.integers(1, 8), st.integers(1, 16), st.integers(1, 3))
names = st.sampled_from(sorted(SCHEDULES))
# Times a split backward may take for the zero-bubble formula to hold: W no longer than F or I.
times = st.tuples(st.integers(2, 8), st.integers(2, 8), st.integers(1, 2))


def make(name, size):
    stages, micro_batches, virtual = size
    return schedule(name, stages, micro_batches, max(virtual, 2) if name == "interleaved-1f1b" else virtual)


def largest_round(stages, micro_batches):
    return -(-micro_batches // max(1, micro_batches // stages))


@quick
@given(names, sizes)
def test_every_schedule_is_sound(name, size):
    plan = make(name, size)
    validate(plan)
    virtual = max(size[2], 2) if name == "interleaved-1f1b" else size[2]
    items = {(micro, chunk) for micro in range(size[1]) for chunk in range(virtual)}
    assert all({(a.micro, a.chunk) for a in actions} == items for actions in plan)
    for actions in plan:  # one order of summation, whatever the schedule
        for kind in "FBIW":
            for chunk in range(virtual):
                micros = [a.micro for a in actions if a.kind == kind and a.chunk == chunk]
                assert micros == sorted(micros)


@quick
@given(sizes, times)
def test_bubbles_equal_the_closed_formulas(size, time):
    (p, m, v), (forward, inputs, weight) = size, time

    def idle(name, virtual):
        cost = {"forward": forward, "backward": inputs + weight, "input": inputs, "weight": weight}
        simulation = simulate(schedule(name, p, m, virtual), **cost)
        work = m * (forward + inputs + weight)
        assert simulation.bubble == pytest.approx(1 - work / simulation.makespan)
        return simulation.makespan - work

    ramp = (p - 1) * (forward + inputs + weight)
    assert idle("gpipe", 1) == pytest.approx(ramp)
    assert idle("1f1b", 1) == pytest.approx(ramp)
    shortfall = max(0, p - m) * weight  # too few micro-batches to fill the bubble with
    assert idle("zero-bubble", 1) == pytest.approx((p - 1) * (forward + inputs - weight) + shortfall)
    if m >= p:
        assert idle("gpipe", v) == pytest.approx(ramp / v)
        assert idle("1f1b", v) == pytest.approx(ramp / v)
        assert idle("zero-bubble", v) == pytest.approx((p - 1) * (forward + inputs - weight) / v)
    if v > 1:
        assert schedule("interleaved-1f1b", p, m, v) == schedule("1f1b", p, m, v)


@quick
@given(sizes)
def test_activations_alive_stay_within_the_papers_bounds(size):
    p, m, v = size
    round_size = largest_round(p, m)
    assert simulate(schedule("gpipe", p, m, v)).peak == (m * v,) * p
    assert simulate(schedule("1f1b", p, m)).peak == tuple(min(m, p - rank) for rank in range(p))
    assert simulate(schedule("zero-bubble", p, m)).peak == (min(m, p),) * p
    assert max(simulate(schedule("zero-bubble", p, m, v)).peak) <= p + (v - 1) * round_size
    if v > 1:
        peak = simulate(schedule("interleaved-1f1b", p, m, v)).peak
        assert all(n <= 2 * (p - 1 - rank) + (v - 1) * round_size + 1 for rank, n in enumerate(peak))


def test_interleaving_is_megatrons():
    """Rank 0 of `p=2, m=4, v=2`: rounds of two, (p-1-r)*2 + (v-1)*p forwards of warm-up, then 1F1B."""
    plan = schedule("interleaved-1f1b", 2, 4, 2)
    assert " ".join(f"{kind}{micro}.{chunk}" for kind, micro, chunk in plan[0]) == (
        "F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0"
    )


def run_channels(plan):
    """Run every rank's program in order over untagged FIFO channels; returns when all end, fails on a wrong message."""
    programs = [deque(program(plan, rank)) for rank in range(len(plan))]
    sent = {pair: [] for pair in messages(plan)}
    posted = {pair: [] for pair in messages(plan)}
    local, begun = set(), [False] * len(plan)

    def ready(rank, message):
        if message is None or message in local:
            return True
        line = (message.source, rank)
        if message not in posted.get(line, ()):
            assert message.source == rank, f"{message} was not posted"
            return False
        return posted[line].index(message) < len(sent[line])

    def advance(rank):
        step = programs[rank][0]
        if not begun[rank]:
            for message in step.post:
                posted[message.source, rank].append(message)
            begun[rank] = True
        if not ready(rank, step.receive):
            return False
        if step.send is not None and step.send.target == rank:
            local.add(step.send)
        elif step.send is not None:
            sent[rank, step.send.target].append(step.send)
        programs[rank].popleft()
        begun[rank] = False
        return True

    while any(programs):
        assert sum(bool(programs[rank]) and advance(rank) for rank in range(len(plan))), "deadlock"
    assert posted == sent  # every receive met the message it was posted for, and none is left over


@quick
@given(names, sizes)
def test_programs_run_over_fifo_channels(name, size):
    plan = make(name, size)
    run_channels(plan)
    run_channels(forward_only(plan))


@quick
@given(names, sizes)
def test_a_chunk_is_done_once_at_its_last_gradient(name, size):
    plan = make(name, size)
    for rank, actions in enumerate(plan):
        done = [(i, step.action.chunk) for i, step in enumerate(program(plan, rank)) if step.last]
        assert sorted(chunk for _, chunk in done) == sorted({action.chunk for action in actions})
        assert all(a.chunk != chunk for i, chunk in done for a in actions[i + 1 :])


def test_communication_delays_but_does_not_occupy():
    """A GPipe pays it once per hop each way; 1F1B, whose ranks take turns, pays more but still overlaps some."""
    assert simulate(schedule("gpipe", 4, 8), communication=0.25).makespan == 33 + 2 * 3 * 0.25
    assert 33 + 2 * 3 * 0.25 < simulate(schedule("1f1b", 4, 8), communication=0.25).makespan < 33 + 2 * 8 * 3 * 0.25


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (((Action("F", 0, 0),),), "runs F on micro-batch 0, chunk 0"),
        (((Action("B", 0, 0), Action("F", 0, 0)),), "runs BF"),
        (((Action("F", 0, 0), Action("W", 0, 0), Action("I", 0, 0)),), "runs FWI"),
        (((Action("F", 0, 0), Action("B", 0, 0)), ()), "rank 1 runs nothing"),
        # Rank 0 finishes micro-batch 0 before it starts 1, which rank 1 wants first.
        (
            (
                (Action("F", 0, 0), Action("B", 0, 0), Action("F", 1, 0), Action("B", 1, 0)),
                (Action("F", 1, 0), Action("B", 1, 0), Action("F", 0, 0), Action("B", 0, 0)),
            ),
            "deadlocks: rank 0 at Action",
        ),
    ],
)
def test_validate_names_the_fault(plan, message):
    with pytest.raises(ValueError, match=message):
        validate(plan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 2), "choose one of gpipe, 1f1b"),
        (("1f1b", 0, 2), "stages = 0"),
        (("gpipe", 2, 0), "micro_batches = 0"),
        (("gpipe", 2, 2, 0), "virtual = 0"),
        (("interleaved-1f1b", 2, 4, 1), "virtual >= 2"),
    ],
)
def test_bad_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)


def test_draw_writes_a_png(tmp_path):
    path = draw(simulate(schedule("zero-bubble", 4, 8, 2)), tmp_path / "plan.png", "zero-bubble")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.png"]

"""The object-store transport says the same as the in-process one, for any two layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytron.actors import ActorGroup, ObjectStore, WorkerError
from raytron.actors.transport import messages, pack, unpack
from raytron.parallel.layout import Layout, Piece, Spec, plan
from raytron.parallel.storage import allocate
from raytron.parallel.transport import run
from tests.actors.engines import Holder, fill

ROWS, COLS = 12, 8


def sharded(places: list[str], dim: int, dtype: str, transposed: bool = False, copies: int = 1) -> Layout:
    """One matrix cut along `dim`, each part held by `copies` consecutive places."""
    parts = len(places) // copies
    shape = (ROWS, COLS)
    pieces = []
    for part in range(parts):
        lo, hi = (shape[dim] * edge // parts for edge in (part, part + 1))
        box = tuple((lo, hi) if d == dim else (0, n) for d, n in enumerate(shape))
        rows, cols = (b - a for a, b in box)
        strides = (1, rows) if transposed else (cols, 1)
        pieces.append(Piece(box, "weights", 0, strides, tuple(places[part * copies : (part + 1) * copies])))
    sizes = {
        (place, "weights"): (p.box[0][1] - p.box[0][0]) * (p.box[1][1] - p.box[1][0])
        for p in pieces
        for place in p.places
    }
    return Layout(0, {"w": Spec(shape, dtype)}, {"w": tuple(pieces)}, sizes)


def tensor(dtype: str) -> torch.Tensor:
    return torch.arange(ROWS * COLS, dtype=torch.float32).reshape(ROWS, COLS).to(getattr(torch, dtype))


def places(start: int, count: int) -> list[str]:
    return [f"actor-{i}" for i in range(start, start + count)]


LAYOUTS = {
    "dim": st.integers(0, 1),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "transposed": st.booleans(),
    "copies": st.integers(1, 2),
}


@given(st.fixed_dictionaries(LAYOUTS), st.fixed_dictionaries(LAYOUTS))
def test_packed_and_unpacked_is_what_the_target_asked_for(source_of: dict, target_of: dict):
    source, target = sharded(places(0, 4), **source_of), sharded(places(2, 4), **target_of)
    old, new = allocate(source), allocate(target)
    fill(source, old, {"w": tensor(source_of["dtype"])})
    for message in messages(plan(source, target), str, str):
        data = pack(message.cuts, old)
        data.flags.writeable = False
        for cuts in message.receivers.values():
            unpack(data, cuts, new)
    want = allocate(target)
    fill(target, want, {"w": tensor(target_of["dtype"])})
    assert all(torch.equal(new[key], want[key]) for key in want)


def test_replicas_receive_one_message():
    source, target = sharded(places(0, 1), 0, "float32"), sharded(places(1, 4), 0, "float32", copies=4)
    (message,) = messages(plan(source, target), str, str)
    assert sorted(message.receivers) == places(1, 4)


def test_between_actors(group: ActorGroup):
    source, target = sharded(places(0, 2), 0, "float32"), sharded(places(2, 2), 1, "bfloat16", transposed=True)
    group.create(Holder, source, {"w": tensor("float32")}, ranks=[0, 1])
    group.create(Holder, target, None, ranks=[2, 3])
    actors = {f"actor-{rank}": worker for rank, worker in enumerate(group.workers)}
    run(plan(source, target), ObjectStore(actors, actors), max_bytes=64)
    want = allocate(target)
    fill(target, want, {"w": tensor("bfloat16")})
    for flat in group.call("flat", ranks=[2, 3]):
        for key, value in flat.items():
            assert np.array_equal(value, want[key].float().numpy())


def test_a_missing_buffer_is_an_error_of_its_rank(group: ActorGroup):
    source, target = sharded(places(0, 2), 0, "float32"), sharded(places(2, 2), 1, "float32")
    group.create(Holder, target, None)  # ranks 0 and 1 hold nothing of it
    actors = {f"actor-{rank}": worker for rank, worker in enumerate(group.workers)}
    with pytest.raises(WorkerError, match=r"rank [01] .* failed in pack: ValueError: no buffer 'weights'"):
        run(plan(source, target), ObjectStore(actors, actors))

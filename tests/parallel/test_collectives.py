"""Collectives against what one process computes from all ranks' inputs, and letting go of them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from raytron.parallel import collectives
from raytron.parallel.collectives import Axis, GaveUp, World
from raytron.parallel.mesh import Mesh

MESHES = [(Mesh(tp=4), "tp"), (Mesh(dp=2, tp=2), "dp"), (Mesh(pp=2, tp=2), "tp")]
ROWS = 3


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Operators with gradients. `dense` computes every rank's output from every rank's input in one process. `same`: all
# ranks hold one and the same input ("in"), or output ("out"), which then counts once in the loss.


def block_sizes(n: int) -> list[list[int]]:
    """Rows rank i sends to rank j: all different, some none."""
    return [[(i + 2 * j) % (n + 1) for j in range(n)] for i in range(n)]


def dense_all_to_all(xs):
    parts = [x.split(sizes) for x, sizes in zip(xs, block_sizes(len(xs)), strict=True)]
    return [torch.cat([mine[j] for mine in parts]) for j in range(len(xs))]


def all_to_all(x, axis):
    sizes = block_sizes(axis.size)
    return collectives.all_to_all(x, axis, sizes[axis.index], [row[axis.index] for row in sizes])


def gather_equal(x, axis):
    return collectives.gather_rows(x, axis, summed=False)


def shift_back(x, axis):
    return collectives.ring_shift(x, axis, shift=-1)


def few(n: int, i: int) -> int:
    return ROWS


def many(n: int, i: int) -> int:
    return n * ROWS


# name -> (operator of one rank, dense, rows of the input of rank i of n, same)
OPERATORS = {
    "copy": (collectives.copy, lambda xs: [x * 1.0 for x in xs], few, "in"),
    "reduce": (collectives.reduce, lambda xs: [sum(xs)] * len(xs), few, "out"),
    "gather": (collectives.gather_rows, lambda xs: [torch.cat(xs) for _ in xs], few, ""),
    "gather of equals": (gather_equal, lambda xs: [torch.cat(xs)] * len(xs), few, "out"),
    "scatter": (collectives.scatter_rows, lambda xs: list(sum(xs).chunk(len(xs))), many, ""),
    "split": (collectives.split_rows, lambda xs: list(xs[0].chunk(len(xs))), many, "in"),
    "all_to_all": (all_to_all, dense_all_to_all, lambda n, i: sum(block_sizes(n)[i]), ""),
    "even all_to_all": (
        collectives.all_to_all,
        lambda xs: [torch.cat([x.chunk(len(xs))[j] for x in xs]) for j in range(len(xs))],
        many,
        "",
    ),
    "ring": (collectives.ring_shift, lambda xs: [xs[i - 1] * 1.0 for i in range(len(xs))], few, ""),
    "ring back": (shift_back, lambda xs: [xs[(i + 1) % len(xs)] * 1.0 for i in range(len(xs))], few, ""),
}


def run_operators(world: World, name: str) -> None:
    axis = world.axis(name)
    n = axis.size
    for number, (operator, dense, height, same) in enumerate(OPERATORS.values()):
        seed = 1000 * number + 10 * axis.ranks[0]
        xs = [normal(height(n, i), 2, seed=seed + i).requires_grad_() for i in range(n)]
        if same == "in":
            xs = xs[:1] * n
        wanted = dense(xs)
        pulls = [normal(*y.shape, seed=seed + 5 + (0 if same == "out" else i)) for i, y in enumerate(wanted)]
        once = 1 if same == "out" else n
        torch.autograd.backward(wanted[:once], pulls[:once])
        x = xs[axis.index].detach().clone().requires_grad_()
        y = operator(x, axis)
        y.backward(pulls[axis.index])
        torch.testing.assert_close(y, wanted[axis.index])
        torch.testing.assert_close(x.grad, xs[axis.index].grad)


@pytest.mark.parametrize(("mesh", "axis"), MESHES, ids=str)
def test_operators_equal_the_dense_formula_forward_and_backward(ranks, mesh, axis):
    ranks.run(run_operators, mesh, axis)


def run_plain(world: World) -> None:
    axis = world.axis("tp")
    n, me = axis.size, axis.index
    inputs = [normal(2 * n, 3, seed=i) for i in range(n)]
    stack = torch.stack(inputs)
    for op, wanted in {"sum": stack.sum(0), "max": stack.amax(0), "min": stack.amin(0)}.items():
        mine = inputs[me].clone()
        assert axis.all_reduce_(mine, op) is mine
        torch.testing.assert_close(mine, wanted)
    mine = inputs[me].clone()
    axis.all_reduce_(mine, async_op=True).wait()
    torch.testing.assert_close(mine, sum(inputs))
    torch.testing.assert_close(axis.reduce_scatter(inputs[me].t().contiguous().t()), sum(inputs)[2 * me : 2 * me + 2])
    flat = torch.zeros(5 * n)
    flat[5 * me : 5 * me + 5] = me + 1
    axis.all_gather_into_(flat)
    assert flat.tolist() == [float(i // 5 + 1) for i in range(5 * n)]
    half = axis.reduce_scatter(torch.full((n, 1), 2.0**-8, dtype=torch.bfloat16) + (me == 0))
    assert (half.dtype, half.item()) == (torch.bfloat16, 1.015625)  # summed in fp32, rounded once
    axis.barrier()


def test_operations_without_gradients(ranks):
    ranks.run(run_plain, Mesh(tp=4))


DTYPES = [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool,
]  # fmt: skip


def run_moves(world: World) -> None:
    axis = world.axis("world")
    n, me = axis.size, axis.index

    def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
        return got.dtype == wanted.dtype and torch.equal(got.float(), wanted.float())

    for dtype in DTYPES:
        xs = [(normal(6, 2, seed=i) * 4).to(dtype) for i in range(n)]
        assert same(axis.all_gather(xs[me]), torch.cat(xs))
        assert same(axis.broadcast_(xs[me].clone(), src=n - 1), xs[n - 1])
        sizes = [1 + (me + j) % n for j in range(n)]
        sent = xs[me][:1].expand(sum(sizes), 2)
        received = axis.all_to_all(sent, sizes, [1 + (i + me) % n for i in range(n)])
        assert same(received, torch.cat([xs[i][:1].expand(1 + (i + me) % n, 2) for i in range(n)]))
        # Two messages to one rank arrive in the order they were sent.
        handles = [axis.isend(part, (me + 1) % n) for part in xs[me].chunk(2)]
        first, second = torch.empty(3, 2, dtype=dtype), torch.empty(3, 2, dtype=dtype)
        for handle in [axis.irecv(first, (me - 1) % n), axis.irecv(second, (me - 1) % n), *handles]:
            handle.wait()
        assert same(torch.cat((first, second)), xs[me - 1])


def test_any_dtype_is_moved_bit_for_bit(ranks):
    """FP8 included, which gloo does not know."""
    ranks.run(run_moves, Mesh(dp=4))


def test_a_line_of_one_is_the_identity():
    axis, x = Axis.single(), normal(4, 2, seed=0)
    same = [
        axis.all_reduce_(x), axis.all_gather(x), axis.reduce_scatter(x), axis.all_to_all(x), axis.broadcast_(x),
        axis.all_gather_into_(x), *(operator(x, axis) for operator, *_ in OPERATORS.values()),
    ]  # fmt: skip
    assert all(y is x for y in same)
    axis.all_reduce_(x, async_op=True).wait()
    axis.barrier()


def run_extra(world: World) -> float:
    """A background thread reduces over its own groups while this one reduces over the world's, unordered."""
    extra, total = world.extra("saver"), torch.zeros(())
    background = torch.ones(())

    def work():
        for _ in range(20):
            extra.all_reduce_(background.fill_(world.rank))

    thread = threading.Thread(target=work)
    if world.rank % 2:
        thread.start()
    for _ in range(20):
        world.axis("world").all_reduce_(total.fill_(1.0))
    if not world.rank % 2:
        thread.start()
    thread.join()
    assert world.extra("saver") is extra
    return total.item() * 100 + background.item()


def test_an_extra_line_does_not_interleave_with_the_world(ranks):
    assert ranks.run(run_extra, Mesh(dp=3)) == [303.0] * 3


# Letting go


OPERATIONS = ("all_reduce", "reduce_scatter", "irecv", "barrier", "first use of an axis")


def block(world: World, operation: str) -> None:
    """Wait for a peer that never comes."""
    axis = world.axis("tp")
    if operation == "all_reduce":
        axis.all_reduce_(torch.zeros(4))
    elif operation == "reduce_scatter":
        axis.reduce_scatter(torch.zeros(4))
    elif operation == "irecv":
        axis.irecv(torch.zeros(4), 1).wait()
    elif operation == "barrier":
        axis.barrier()
    else:
        world.extra("checkpoint")


def reason_of(wait, *args) -> str:
    """Of the `GaveUp` it raises. Its traceback, which would keep the group alive, ends here."""
    with pytest.raises(GaveUp) as caught:
        wait(*args)
    return str(caught.value)


def run_give_up(world: World, path: str) -> list[str]:
    """Rank 0 is blocked once for each operation, in a generation of its own; rank 1 only connects. Then both regroup.

    Groups have a timeout of 10 minutes: neither the wait, nor closing, nor regrouping may need it.
    """
    store, reasons = dist.FileStore(path, 2), []
    for operation in OPERATIONS:
        mine = World(world.mesh, world.rank, store, timeout=600.0, prefix=operation)
        if world.rank == 0:
            about_to_block = threading.Event()
            thread = threading.Thread(target=_release, args=(mine, about_to_block, operation))
            thread.start()
            about_to_block.set()
            reasons.append(reason_of(block, mine, operation))
            thread.join()
            with pytest.raises(GaveUp):  # from now on
                mine.axis("world").isend(torch.zeros(1), 1)
            mine.close()
            store.set(f"released-{operation}", "")
        else:
            store.wait([f"released-{operation}"])  # present, silent: closing its end would release rank 0 too
            mine.close()
    again = World(world.mesh, world.rank, store, timeout=600.0, prefix="again")
    assert again.axis("tp").all_reduce_(torch.ones(2)).tolist() == [2.0, 2.0]
    assert collectives.ring_shift(torch.tensor([world.rank]), again.axis("tp")).item() == 1 - world.rank
    again.close()
    return reasons


def _release(world: World, about_to_block: threading.Event, reason: str) -> None:
    about_to_block.wait()
    time.sleep(0.3)  # so that the other thread is inside its wait; it gives up either way
    world.give_up(f"lost during {reason}")


def test_giving_up_releases_a_blocked_rank_and_the_ranks_can_regroup(ranks, tmp_path):
    reasons, _ = ranks.run(run_give_up, Mesh(tp=2), str(tmp_path / "store"))
    assert reasons == [f"collective abandoned: lost during {operation}" for operation in OPERATIONS]


def run_timeout(world: World, path: str) -> str | None:
    """Nobody tells rank 0 to give up: the group's own timeout ends its wait."""
    store = dist.FileStore(path, 2)
    mine = World(world.mesh, world.rank, store, timeout=0.5)
    caught = None
    if world.rank == 0:
        with pytest.raises(RuntimeError) as caught:
            mine.axis("tp").all_reduce_(torch.zeros(4))
        assert not isinstance(caught.value, GaveUp)
        store.set("released", "")
    store.wait(["released"])
    mine.close()
    return None if caught is None else str(caught.value)


def test_an_absent_peer_is_reported_after_the_timeout(ranks, tmp_path):
    message, _ = ranks.run(run_timeout, Mesh(tp=2), str(tmp_path / "store"))
    assert "timed out" in message.lower()


# torchrun

SCRIPT = """
import os, sys
import torch
from raytron.parallel.collectives import World
from raytron.parallel.mesh import Mesh

world = World.from_env(Mesh(tp=2))
total = world.axis("tp").all_reduce_(torch.tensor([world.rank + 1.0])).item()
assert "ray" not in sys.modules
with open(os.path.join(sys.argv[1], str(world.rank)), "w") as file:
    file.write(f"{total} {world.coords}")
world.close()
"""


def test_under_torchrun_without_ray(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(tmp_path / "script.py"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = [(tmp_path / rank).read_text() for rank in "01"]
    assert written == [f"3.0 Coords(dp=0, pp=0, cp=0, tp={rank})" for rank in "01"]


def test_torchrun_and_mesh_must_agree(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"torchrun started 3 ranks, the mesh has 4; start 4"):
        World.from_env(Mesh(dp=4))
    with pytest.raises(ValueError, match="needs a store"):
        World(Mesh(dp=2), 0, None)

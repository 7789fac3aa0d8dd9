"""Collectives over one axis of a mesh, through one seam that can give up.

A `World` is one rank's seat in a `Mesh`; `world.axis("tp")` is its line of neighbours. Process groups are made
straight from a store (a prefix per generation and axis), never registered in torch's global default group, so several
generations can live side by side and survivors of a failure regroup without leaving their process.

The seam exists because a blocked gloo collective is released only by its own full timeout: `abort`, `shutdown` and
`destroy_process_group` return at once and free nobody. So every wait here is cut in slices and asks between slices
whether the world was told to give up. Gloo's point-to-point works are different: a timed-out wait on one poisons the
whole group, so they are waited for by a thread each, and only that thread's event is waited for in slices. Closing a
gloo group with an operation in flight blocks as long as the timeout; such groups are parked instead (kept alive until
the process ends, which then has to leave by `os._exit`). NCCL never blocks the host in `wait`; it is aborted from the
thread that calls `give_up`.

The autograd operators carry the names of Megatron-LM (Shoeybi et al. 2019, Korthikanti et al. 2022): `copy` is f,
`reduce` is g, `gather_rows` / `scatter_rows` are g-bar of sequence parallelism.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue

import torch
import torch.distributed as dist

from raytron.parallel.mesh import Coords, Mesh

__all__ = [
    "Axis",
    "GaveUp",
    "Handle",
    "Waits",
    "World",
    "all_to_all",
    "copy",
    "gather_rows",
    "reduce",
    "ring_shift",
    "scatter_rows",
    "split_rows",
]

SLICE = timedelta(milliseconds=50)  # how long a rank that is told to give up may go on waiting
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
_PARKED: list[object] = []  # groups that may still have an operation in flight; freeing one would block


class GaveUp(RuntimeError):  # noqa: N818 - reads as what happened: the wait gave up
    """A collective was abandoned because the world was told to give up."""


@dataclass
class Waits:
    """A thread's waits for its peers: since when the present one (`time.monotonic`, None outside), how long all of them
    took, and when the last one ended."""

    since: float | None = None
    total_s: float = 0.0
    last: float = 0.0


class _Gate:
    """Shared by all axes of a world: closed once, by `World.give_up`."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.waits: dict[int, Waits] = {}  # by thread

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Note that this thread waits for a peer."""
        waits = self.waits.setdefault(threading.get_ident(), Waits())
        start = waits.since = time.monotonic()
        try:
            yield
        finally:
            waits.last, waits.since = time.monotonic(), None
            waits.total_s += waits.last - start

    def check(self) -> None:
        if self.reason is not None:
            raise GaveUp(f"collective abandoned: {self.reason}")


class Handle:
    """An operation under way. `wait()` returns when its result may be read; `GaveUp` if the world gave up first."""

    def __init__(self, gate: _Gate, work: dist.Work | None = None, keep: tuple = ()) -> None:
        self._gate, self._work, self._keep = gate, work, keep

    def arrived(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        return self._work is None or self._work.is_completed()

    def wait(self) -> None:
        if self._work is not None:
            with self._gate.waiting():
                self._wait()
        self._keep = ()

    def _wait(self) -> None:
        while self._work is not None:
            self._gate.check()
            try:
                self._work.wait(SLICE)
                self._work = None
            except RuntimeError as error:
                # The slice ended; the work may complete any moment. A failed work (a lost peer, gloo's own timeout)
                # says something else.
                if "Operation timed out!" not in str(error):
                    self._gate.check()
                    raise


class _NcclHandle(Handle):
    """NCCL orders the result on the current stream; the host does not block here."""

    def wait(self) -> None:
        self._gate.check()
        if self._work is not None:
            self._work.wait()
            self._work = None


class _MessageHandle(Handle):
    """A gloo send or receive, waited for by a `_Waiter` thread."""

    def __init__(self, gate: _Gate) -> None:
        super().__init__(gate)
        self.done = threading.Event()
        self.error: BaseException | None = None

    def arrived(self) -> bool:
        return self.done.is_set()

    def wait(self) -> None:
        with self._gate.waiting():
            while not self.done.wait(SLICE.total_seconds()):
                self._gate.check()
        if self.error is not None:
            self._gate.check()
            raise self.error


class _Waiter:
    """Waits for the works of one peer and direction, in order; a daemon, abandoned with its group."""

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, work: dist.Work, tensor: torch.Tensor, handle: _MessageHandle) -> None:
        self._queue.put((work, tensor, handle))

    def close(self, abandon: bool) -> None:
        """End the thread. Left running, it may free its last work while the interpreter exits, which aborts."""
        self._queue.put(None)
        if not abandon:
            self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, _tensor, handle = item  # holding the tensor keeps its memory while gloo reads or writes it
            try:
                work.wait()
            except RuntimeError as error:
                handle.error = error
            del work, _tensor, item
            handle.done.set()


class Axis:
    """This rank's line of neighbours along one mesh axis.

    Attributes:
        name: axis name.
        ranks: global ranks on the line, in axis order.
        size, index: length of the line and this rank's position on it.

    Every operation is the identity on a line of one.
    """

    def __init__(self, name: str, ranks: tuple[int, ...], index: int, groups: dict[str, object], gate: _Gate) -> None:
        self.name, self.ranks, self.index, self.size = name, ranks, index, len(ranks)
        self._groups, self._gate = groups, gate
        self._waiters: dict[tuple[str, int], _Waiter] = {}

    @classmethod
    def single(cls, name: str = "single") -> Axis:
        """A line of one."""
        return cls(name, (0,), 0, {}, _Gate())

    def __repr__(self) -> str:
        return f"Axis({self.name}, {self.index} of {self.size})"

    def _group(self, tensor: torch.Tensor):
        self._gate.check()
        return self._groups[tensor.device.type]

    def _handle(self, tensor: torch.Tensor, work: dist.Work, *keep: torch.Tensor) -> Handle:
        kind = _NcclHandle if tensor.is_cuda else Handle
        return kind(self._gate, work, (tensor, *keep))

    def all_reduce_(self, tensor: torch.Tensor, op: str = "sum", async_op: bool = False) -> Handle | torch.Tensor:
        """Reduce `tensor` (contiguous) in place over the axis. Returns it, or with `async_op` a `Handle`."""
        if self.size == 1:
            return Handle(self._gate) if async_op else tensor
        options = dist.AllreduceOptions()
        options.reduceOp = _OPS[op]
        handle = self._handle(tensor, self._group(tensor).allreduce([tensor], options))
        if async_op:
            return handle
        handle.wait()
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[N, ...] on each rank -> [size * N, ...], concatenated along the first dim in axis order."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        out = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:]))
        self._handle(tensor, self._group(tensor)._allgather_base(_bytes(out), _bytes(tensor))).wait()
        return out

    def all_gather_into_(self, out: torch.Tensor, async_op: bool = False) -> Handle | torch.Tensor:
        """Fill flat `out` [size * N] from every rank's own N elements, already in place at its index."""
        if self.size == 1:
            return Handle(self._gate) if async_op else out
        mine = out.view(self.size, -1)[self.index].clone()
        handle = self._handle(out, self._group(out)._allgather_base(_bytes(out), _bytes(mine)), mine)
        if async_op:
            return handle
        handle.wait()
        return out

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """[size * N, ...] on each rank -> [N, ...], the sum over ranks of this rank's share of the first dim."""
        if self.size == 1:
            return tensor
        handle, parts = self.reduce_scatter_start(tensor)
        handle.wait()
        return parts.sum(0, dtype=tensor.dtype)

    def reduce_scatter_start(self, tensor: torch.Tensor) -> tuple[Handle, torch.Tensor]:
        """Start a reduce-scatter; after waiting, the result is the sum of the returned tensor over its first dim.

        On gloo it is an all-to-all whose parts are summed in axis order: twice as fast there as its own reduce-scatter,
        and the order of summation is fixed. NCCL returns one part, already summed.
        """
        tensor = tensor.contiguous()
        group, shape = self._group(tensor), (tensor.shape[0] // self.size, *tensor.shape[1:])
        if tensor.is_cuda:
            out = tensor.new_empty((1, *shape))
            return self._handle(tensor, group._reduce_scatter_base(out[0], tensor)), out
        parts = torch.empty_like(tensor)
        return self._handle(tensor, group.alltoall_base(parts, tensor, [], []), parts), parts.view(self.size, *shape)

    def all_to_all(self, tensor: torch.Tensor, sizes_in: list[int] | None = None, sizes_out: list[int] | None = None):
        """Send `sizes_in[i]` rows to rank i, receive `sizes_out[i]` from it; by default equal shares of dim 0."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        rows = tensor.shape[0] if sizes_out is None else sum(sizes_out)
        out = tensor.new_empty((rows, *tensor.shape[1:]))
        work = self._group(tensor).alltoall_base(_bytes(out), _bytes(tensor), sizes_out or [], sizes_in or [])
        self._handle(tensor, work, out).wait()
        return out

    def broadcast_(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Overwrite `tensor` (contiguous) with that of position `src` on the axis."""
        if self.size > 1:
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = src, 0
            self._handle(tensor, self._group(tensor).broadcast([_bytes(tensor)], options)).wait()
        return tensor

    def isend(self, tensor: torch.Tensor, dst: int) -> Handle:
        """Start sending `tensor` to position `dst`. Messages between two ranks arrive in the order they are sent."""
        return self._message("send", tensor.contiguous(), dst)

    def irecv(self, tensor: torch.Tensor, src: int) -> Handle:
        """Start receiving into `tensor` (contiguous) from position `src`."""
        return self._message("recv", tensor, src)

    def barrier(self) -> None:
        """Wait until every rank of the axis is here."""
        self.all_reduce_(torch.zeros(1))

    def _message(self, kind: str, tensor: torch.Tensor, peer: int) -> Handle:
        if tensor.is_cuda:
            self._gate.check()
            upwards = (self.index < peer) == (kind == "send")
            group = self._groups["cuda-up" if upwards else "cuda-down"]
            return self._handle(tensor, getattr(group, kind)([tensor], peer, 0))
        work = getattr(self._group(tensor), kind)([_bytes(tensor)], peer, 0)
        if (kind, peer) not in self._waiters:
            self._waiters[kind, peer] = _Waiter(f"{self.name}-{kind}-{peer}")
        handle = _MessageHandle(self._gate)
        self._waiters[kind, peer].put(work, tensor, handle)
        return handle

    def close(self) -> None:
        for waiter in self._waiters.values():
            waiter.close(abandon=self._gate.reason is not None)
        if self._gate.reason is not None:
            _PARKED.append(dict(self._groups))
        self._groups.clear()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Moved, not reduced, tensors of one-byte floats travel as uint8: gloo knows no FP8."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 and tensor.is_floating_point() else tensor


class World:
    """One rank's seat in a mesh, with live process groups.

    Args:
        mesh: axis sizes.
        rank: this rank, in [0, mesh.size).
        store: a `torch.distributed.Store` every rank reaches; None for a world of one.
        device: where this rank's tensors live; a CUDA device adds NCCL groups beside gloo's.
        timeout: seconds after which an operation nobody abandoned fails by itself.
        prefix: generation of the groups; a regrouped world takes a new one on the same store.
        connect: False makes a seat without groups (`World.sketch`).

    Every rank of the mesh constructs its world at the same time. Dense axes are connected then, others on first use,
    which all ranks of such a line must reach in the same order.
    """

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        store: dist.Store | None,
        *,
        device: str | torch.device = "cpu",
        timeout: float = 600.0,
        prefix: str = "gen0",
        connect: bool = True,
    ) -> None:
        if connect and store is None and mesh.size > 1:
            raise ValueError(f"a world of {mesh.size} ranks needs a store to meet at")
        self.mesh, self.rank, self.device = mesh, rank, torch.device(device)
        self.coords: Coords = mesh.coords(rank)
        self._store, self._timeout, self._prefix = store, timedelta(seconds=timeout), prefix
        self._gate = _Gate()
        self._live = connect
        self._axes: dict[str, Axis] = {}
        for axis in ("world", "dp", "pp", "cp", "tp"):
            self.axis(axis)

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> World:
        """A world of one rank; needs no store."""
        return cls(Mesh(), 0, None, device=device)

    @classmethod
    def sketch(cls, mesh: Mesh, rank: int) -> World:
        """A seat without groups: knows its place on every axis and can build a model, but not talk."""
        return cls(mesh, rank, None, connect=False)

    @classmethod
    def from_env(cls, mesh: Mesh, *, timeout: float = 600.0) -> World:
        """The world `torchrun` describes in RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and LOCAL_RANK."""
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if size != mesh.size:
            raise ValueError(f"torchrun started {size} ranks, the mesh has {mesh.size}; start {mesh.size} in all")
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        if size == 1:
            return cls(mesh, rank, None, device=device, timeout=timeout)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun's agent already listens on the port (TORCHELASTIC_USE_AGENT_STORE); otherwise rank 0 does.
        master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = dist.TCPStore(address, port, size, master, timedelta(seconds=timeout), multi_tenant=True)
        # A restarted attempt meets in the same store, where the last one's keys still are.
        prefix = "/".join(os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RUN_ID", "RESTART_COUNT"))
        return cls(mesh, rank, store, device=device, timeout=timeout, prefix=prefix)

    def axis(self, name: str) -> Axis:
        """The line of `name` (see `Mesh.group`) that this rank is on."""
        if name not in self._axes:
            ranks = self.mesh.group(name, self.rank)
            groups = self._connect(name, ranks) if len(ranks) > 1 else {}
            self._axes[name] = Axis(name, ranks, ranks.index(self.rank), groups, self._gate)
        return self._axes[name]

    def extra(self, name: str) -> Axis:
        """A line over all ranks with process groups of its own, for a background thread that must not interleave."""
        key = f"world-{name}"
        if key not in self._axes:
            ranks = self.mesh.group("world", self.rank)
            groups = self._connect(key, ranks) if len(ranks) > 1 else {}
            self._axes[key] = Axis(key, ranks, self.rank, groups, self._gate)
        return self._axes[key]

    def _connect(self, name: str, ranks: tuple[int, ...]) -> dict[str, object]:
        """The line's groups. They are made by a thread of its own: a rendezvous that a rank does not come to cannot be
        ended, but left."""
        if not self._live:
            return {}
        made: Future[dict[str, object]] = Future()

        def meet() -> None:
            try:
                made.set_result(self._meet(name, ranks))
            except Exception as error:
                made.set_exception(error)

        threading.Thread(target=meet, name=f"raytron-{name}", daemon=True).start()
        with self._gate.waiting():
            while not wait([made], SLICE.total_seconds()).done:
                self._gate.check()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread too
        return made.result()

    def _meet(self, name: str, ranks: tuple[int, ...]) -> dict[str, object]:
        line = f"{self._prefix}/{name}/{ranks[0]}"
        place = (ranks.index(self.rank), len(ranks))
        groups: dict[str, object] = {
            "cpu": dist.ProcessGroupGloo(dist.PrefixStore(f"{line}/gloo", self._store), *place, self._timeout)
        }
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # NCCL runs both directions of a pair of ranks on one stream, so a receive posted ahead on both sides would
            # block both: messages up and down the axis get a communicator each.
            for kind in ("cuda", "cuda-up", "cuda-down"):
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = self._timeout
                groups[kind] = dist.ProcessGroupNCCL(dist.PrefixStore(f"{line}/{kind}", self._store), *place, options)
        return groups

    def give_up(self, reason: str) -> None:
        """Release this rank from every wait, now and from now on: they raise `GaveUp`. Callable from any thread."""
        self._gate.reason = reason
        for axis in list(self._axes.values()):  # another thread may be connecting one
            for kind, group in axis._groups.items():
                if kind != "cpu":
                    group.abort()

    def check(self) -> None:
        """Raise `GaveUp` if this rank was told to give up: for long work between two waits."""
        self._gate.check()

    def waits(self, thread: int) -> Waits:
        """The waits of the thread with that identity, over all axes; for an onlooker, who may call it any time."""
        return self._gate.waits.get(thread, Waits())

    def close(self) -> None:
        """Leave the groups. Those with an operation in flight are parked, since freeing them would block."""
        for axis in self._axes.values():
            axis.close()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.axis.all_reduce_(grad.clone(memory_format=torch.contiguous_format)), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return axis.all_reduce_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, summed):
        ctx.axis, ctx.summed = axis, summed
        return axis.all_gather(x)

    @staticmethod
    def backward(ctx, grad):
        axis = ctx.axis
        return (axis.reduce_scatter(grad) if ctx.summed else grad.chunk(axis.size)[axis.index].contiguous()), None, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return axis.reduce_scatter(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.axis.all_gather(grad), None


class _SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.chunk(axis.size)[axis.index].contiguous()

    @staticmethod
    def backward(ctx, grad):
        return ctx.axis.all_gather(grad), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, sizes_in, sizes_out):
        ctx.axis, ctx.sizes = axis, (sizes_in, sizes_out)
        return axis.all_to_all(x, sizes_in, sizes_out)

    @staticmethod
    def backward(ctx, grad):
        sizes_in, sizes_out = ctx.sizes
        return ctx.axis.all_to_all(grad, sizes_out, sizes_in), None, None, None


class _RingShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, shift):
        ctx.axis, ctx.shift = axis, shift
        return _shift(x, axis, shift)

    @staticmethod
    def backward(ctx, grad):
        return _shift(grad, ctx.axis, -ctx.shift), None, None


def _shift(x: torch.Tensor, axis: Axis, shift: int) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    sent, received = axis.isend(x, (axis.index + shift) % axis.size), axis.irecv(out, (axis.index - shift) % axis.size)
    sent.wait()
    received.wait()
    return out


def copy(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Identity forward, all-reduce of the gradient backward: the entrance of a column-parallel region."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """All-reduce (sum) forward, identity backward: the exit of a row-parallel region."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def gather_rows(x: torch.Tensor, axis: Axis, *, summed: bool = True) -> torch.Tensor:
    """[N, ...] -> [size * N, ...]. Backward reduce-scatters, or without `summed` (equal gradients) takes its rows."""
    return x if axis.size == 1 else _GatherRows.apply(x, axis, summed)


def scatter_rows(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Reduce-scatter of the first dim, [size * N, ...] -> [N, ...]; backward all-gathers."""
    return x if axis.size == 1 else _ScatterRows.apply(x, axis)


def split_rows(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's share of the first dim of an equal tensor, [size * N, ...] -> [N, ...]; backward all-gathers."""
    return x if axis.size == 1 else _SplitRows.apply(x, axis)


def all_to_all(
    x: torch.Tensor, axis: Axis, sizes_in: list[int] | None = None, sizes_out: list[int] | None = None
) -> torch.Tensor:
    """`Axis.all_to_all` with its transpose backward."""
    return x if axis.size == 1 else _AllToAll.apply(x, axis, sizes_in, sizes_out)


def ring_shift(x: torch.Tensor, axis: Axis, shift: int = 1) -> torch.Tensor:
    """Send `x` to the position `shift` further on the ring and receive as much from behind; backward turns the ring."""
    return x if axis.size == 1 else _RingShift.apply(x, axis, shift)

"""The executor against the unsplit model: every schedule, several ranks, real gloo messages.

Ranks are threads of this process, each with its own `World` over one store: process groups are not registered globally,
and autograd runs CPU backwards on the calling thread.
"""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from raytron.parallel.collectives import Axis, World
from raytron.parallel.mesh import Mesh
from raytron.parallel.pipeline import Pipeline
from raytron.parallel.schedules import schedule
from raytron.parallel.weight_grad import WeightGradQueue

HIDDEN, LAYERS = 6, 8


class _Defer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_ED, queue):
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.queue = queue
        return x_TD @ weight_ED.T

    @staticmethod
    def backward(ctx, grad_TE):
        x_TD, weight_ED = ctx.saved_tensors
        if not ctx.queue.active:
            return grad_TE @ weight_ED, grad_TE.T @ x_TD, None

        def compute():
            grad_ED = grad_TE.T @ x_TD
            weight_ED.grad = grad_ED if weight_ED.grad is None else weight_ED.grad.add_(grad_ED)

        ctx.queue.push(compute)
        return grad_TE @ weight_ED, None, None


class Layer(nn.Module):
    """Residual, with a parameter that defers (weight) and one that can't (scale)."""

    def __init__(self, index):
        super().__init__()
        generator = torch.Generator().manual_seed(index)
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64))
        self.scale = nn.Parameter(torch.rand(HIDDEN, generator=generator, dtype=torch.float64))
        self.queue = WeightGradQueue()

    def forward(self, x_TD):
        return x_TD + torch.tanh(_Defer.apply(x_TD * self.scale, self.weight, self.queue))


def tokens(micro):
    """Uneven micro-batches: 3, 4, 5, 3, ... tokens."""
    return 3 + micro % 3


def inputs(micro):
    return torch.randn(tokens(micro), HIDDEN, generator=torch.Generator().manual_seed(100 + micro), dtype=torch.float64)


def flat(lists):
    return list(chain.from_iterable(lists))


def gradients(layers):
    return [parameter.grad for layer in layers for parameter in layer.parameters()]


class Stage:
    """One rank's chunks of the model: global stage g = chunk * stages + rank holds an even share of the layers."""

    def __init__(self, rank, stages, virtual):
        self.rank, self.stages, self.virtual = rank, stages, virtual
        self.queue = WeightGradQueue()
        share = LAYERS // (stages * virtual)
        self.chunks = [
            [Layer(i) for i in range(g * share, (g + 1) * share)] for g in range(rank, stages * virtual, stages)
        ]
        for layer in flat(self.chunks):
            layer.queue = self.queue

    def forward(self, chunk, micro, hidden_TD):
        assert (hidden_TD is None) == (self.rank == chunk == 0)
        x_TD = inputs(micro) if hidden_TD is None else hidden_TD
        for layer in self.chunks[chunk]:
            x_TD = layer(x_TD)
        last = chunk == self.virtual - 1 and self.rank == self.stages - 1
        return F.mse_loss(x_TD, torch.ones_like(x_TD), reduction="sum") if last else x_TD


def reference(micro_batches, scale):
    """Losses, and gradients by layer, of the whole model without a pipeline."""
    stage = Stage(0, 1, 1)
    losses = [stage.forward(0, micro, None) for micro in range(micro_batches)]
    for loss in losses:
        (loss * scale).backward()
    return torch.stack(losses).detach(), [gradients([layer]) for layer in stage.chunks[0]]


def on_ranks(world, body):
    """`body(rank, world)` on a thread per rank; the results in rank order, or the first error once all have ended."""

    def run(rank):
        seat = World(Mesh(pp=world), rank, store, timeout=60)
        try:
            return body(rank, seat)
        finally:
            seat.close()

    store = dist.HashStore()
    with ThreadPoolExecutor(world) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in range(world)]]


CASES = [
    (name, virtual, micro_batches)
    for name in ("gpipe", "1f1b", "interleaved-1f1b", "zero-bubble")
    for virtual in (1, 2)
    for micro_batches in (1, 4, 7)
    if not (name == "interleaved-1f1b" and virtual == 1)
]


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_every_schedule_equals_the_unsplit_model(stages):
    scale = 1 / 37

    def body(rank, world):
        results = []
        for name, virtual, micro_batches in CASES:
            stage, done = Stage(rank, stages, virtual), []
            plan = schedule(name, stages, micro_batches, virtual)
            pipeline = Pipeline(world.axis("pp"), plan, weight_grads=stage.queue)
            arguments = {"shape": lambda micro: (tokens(micro), HIDDEN), "dtype": torch.float64}
            evaluated = pipeline.evaluate(stage.forward, **arguments)
            assert gradients(flat(stage.chunks)) == [None] * (2 * LAYERS // stages)

            def complete(chunk, stage=stage, done=done):
                done.append((chunk, [grad.clone() for grad in gradients(stage.chunks[chunk])]))

            losses = pipeline.run(stage.forward, **arguments, scale=scale, on_chunk_done=complete)
            assert [loss.item() for loss in losses] == [loss.item() for loss in evaluated]
            results.append((losses, [gradients(layers) for layers in stage.chunks], dict(done)))
            assert len(done) == virtual
        return results

    ranks = on_ranks(stages, body)
    for case, (_, virtual, micro_batches) in enumerate(CASES):
        expected_losses, expected = reference(micro_batches, scale)
        assert all(results[case][0] == [] for results in ranks[:-1])
        torch.testing.assert_close(torch.stack(ranks[-1][case][0]), expected_losses, rtol=0, atol=1e-12)
        share = LAYERS // (stages * virtual)
        for g in range(stages * virtual):
            chunk, rank = divmod(g, stages)
            wanted = flat(expected[g * share : (g + 1) * share])
            _, grads, done = ranks[rank][case]
            torch.testing.assert_close(grads[chunk], wanted, rtol=0, atol=1e-12)
            torch.testing.assert_close(done[chunk], wanted, rtol=0, atol=1e-12)


def test_gradients_are_added_to_those_already_there():
    def body(rank, world):
        stage = Stage(rank, 2, 1)
        pipeline = Pipeline(world.axis("pp"), schedule("zero-bubble", 2, 3), weight_grads=stage.queue)
        for _ in range(2):
            pipeline.run(stage.forward, shape=lambda micro: (tokens(micro), HIDDEN), dtype=torch.float64)
        return gradients(stage.chunks[0])

    _, expected = reference(3, 1.0)
    got = flat(on_ranks(2, body))
    torch.testing.assert_close(got, [2 * grad for layer in expected for grad in layer], rtol=0, atol=1e-12)


def test_a_first_stage_of_frozen_parameters_has_no_backward():
    def body(rank, world):
        stage = Stage(rank, 2, 1)
        for layer in stage.chunks[0]:
            layer.requires_grad_(rank == 1)
        pipeline = Pipeline(world.axis("pp"), schedule("1f1b", 2, 3))
        pipeline.run(stage.forward, shape=lambda micro: (tokens(micro), HIDDEN), dtype=torch.float64)
        return gradients(stage.chunks[0])

    frozen, trained = on_ranks(2, body)
    assert frozen == [None] * LAYERS
    expected = flat(reference(3, 1.0)[1][LAYERS // 2 :])
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-12)


def test_outputs_are_not_kept_for_backward():
    """GPipe holds every micro-batch's graph at once, but no hidden state that was sent."""
    outputs = []

    def body(rank, world):
        stage = Stage(rank, 2, 1)

        def forward(chunk, micro, hidden_TD):
            output = stage.forward(chunk, micro, hidden_TD)
            if rank == 0:
                gc.collect()
                assert all(output() is None for output in outputs)
                outputs.append(weakref.ref(output))
            return output

        pipeline = Pipeline(world.axis("pp"), schedule("gpipe", 2, 4))
        pipeline.run(forward, shape=lambda micro: (tokens(micro), HIDDEN), dtype=torch.float64)

    on_ranks(2, body)
    assert len(outputs) == 4


def test_an_error_comes_out_unchanged_and_leaves_nothing_behind():
    """The same pipeline runs again afterwards. (On several ranks messages are left under way: the axis is lost.)"""
    stage = Stage(0, 1, 2)
    pipeline = Pipeline(Axis.single(), schedule("zero-bubble", 1, 4, 2), weight_grads=stage.queue)
    arguments = {"shape": lambda micro: (tokens(micro), HIDDEN), "dtype": torch.float64}

    def bad(chunk, micro, hidden_TD):
        if (chunk, micro) == (1, 2):
            raise ArithmeticError("micro-batch 2 is bad")
        return stage.forward(chunk, micro, hidden_TD)

    with pytest.raises(ArithmeticError, match="micro-batch 2 is bad"):
        pipeline.run(bad, **arguments)
    assert not stage.queue.active
    for layer in flat(stage.chunks):
        layer.zero_grad()
    losses = pipeline.run(stage.forward, **arguments)
    expected_losses, expected = reference(4, 1.0)
    torch.testing.assert_close(torch.stack(losses), expected_losses, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(flat(stage.chunks)), flat(expected), rtol=0, atol=1e-12)


def test_a_hidden_state_other_than_announced_is_refused():
    stage = Stage(0, 1, 2)
    pipeline = Pipeline(Axis.single(), schedule("1f1b", 1, 2, 2))
    with pytest.raises(ValueError, match=r"rank 0, chunk 0, micro-batch 1: .*\(4, 6\) torch.float64 where \(3, 6\)"):
        pipeline.run(stage.forward, shape=(3, HIDDEN), dtype=torch.float64)


def test_a_pipeline_that_cannot_run_is_refused():
    with pytest.raises(ValueError, match="make it with stages=1"):
        Pipeline(Axis.single(), schedule("1f1b", 2, 2))
    with pytest.raises(ValueError, match="weight_grads"):
        Pipeline(Axis.single(), schedule("zero-bubble", 1, 2))
    with pytest.raises(ValueError, match="runs F on"):
        Pipeline(Axis.single(), (schedule("1f1b", 1, 2)[0][:-1],))


def fail(queue, ran):
    with queue.collect("b"):
        queue.push(lambda: ran.append(3))
        raise ArithmeticError


def test_queue_runs_in_order_and_forgets_on_clear():
    queue, ran = WeightGradQueue(), []
    with queue.collect("a"):
        assert queue.active
        queue.push(lambda: ran.append(1))
        queue.push(lambda: ran.append(2))
    assert not queue.active
    assert ran == []
    queue.flush("a")
    assert ran == [1, 2]
    with pytest.raises(ArithmeticError):
        fail(queue, ran)
    assert not queue.active
    queue.clear()
    with queue.collect("b"):
        pass
    queue.flush("b")
    assert ran == [1, 2]

"""The one executor that runs any pipeline schedule.

schedules.py says what a rank does and in which order messages cross each pair of ranks; this file does it:

    for step in program:                 # one Step per action of this rank
        post its receives                # and those of the next step: they travel while this one computes
        F: hidden = wait(receive) -> forward -> send the output, keep only its autograd edge
        B: gradient = wait(receive) -> backward -> send the input's gradient
        I: like B, but weight gradients are left in the queue;  W: compute those

Sends never block, and receives are posted in the sender's order, so a rank waits only for messages its schedule makes
it wait for: a schedule that `validate` accepts can't deadlock here. Messages are untagged because NCCL has no tags.

After a send the output is dropped and only its `GradientEdge` is kept: backward starts from the edge and never reads
the output's values. Megatron-LM reaches the same by shrinking the output's storage in place
(`deallocate_output_tensor`) and then calling the C++ engine around its shape check.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from raytron.parallel.collectives import Axis, Handle
from raytron.parallel.schedules import Message, Schedule, Step, forward_only, messages, program
from raytron.parallel.simulation import validate
from raytron.parallel.weight_grad import WeightGradQueue

__all__ = ["Forward", "Pipeline"]

Forward = Callable[[int, int, torch.Tensor | None], torch.Tensor]
Shape = tuple[int, ...] | Callable[[int], tuple[int, ...]]


class _Mail:
    """Messages of one run, sent and received."""

    def __init__(self, axis: Axis, empty: Callable[[int], torch.Tensor]) -> None:
        self._axis, self._empty = axis, empty
        self._arriving: dict[Message, tuple[torch.Tensor, Handle | None]] = {}
        self._last_sent: dict[int, Handle] = {}  # per target: sends to one rank end in order

    def post(self, message: Message) -> None:
        tensor = self._empty(message.micro)
        self._arriving[message] = (tensor, self._axis.irecv(tensor, message.source))

    def take(self, message: Message) -> torch.Tensor:
        tensor, handle = self._arriving.pop(message)
        if handle is not None:
            handle.wait()
        return tensor

    def put(self, message: Message, tensor: torch.Tensor) -> None:
        if message.target == self._axis.index:
            self._arriving[message] = (tensor, None)
        else:
            self._last_sent[message.target] = self._axis.isend(tensor, message.target)

    def finish(self) -> None:
        for handle in self._last_sent.values():
            handle.wait()
        assert not self._arriving, f"messages nobody took: {list(self._arriving)}"


class Pipeline:
    """One rank's part of a pipeline; every rank of `axis` makes it at the same time, with the same schedule.

    Args:
        axis: the pipeline axis; its index is this rank's stage.
        schedule: one list of actions per rank of the axis, see `schedules.schedule`. It fixes the number of
            micro-batches and chunks; a step of another count takes another Pipeline.
        device: where hidden states live.
        weight_grads: the queue this rank's layers defer to; needed by schedules that split the backward pass.

    Raises:
        ValueError: schedule and axis differ in ranks, the schedule is invalid, or it splits and there is no queue.

    After an exception out of `run` or `evaluate` messages may still be under way: the axis has to be formed anew.
    """

    def __init__(
        self,
        axis: Axis,
        schedule: Schedule,
        *,
        device: str | torch.device = "cpu",
        weight_grads: WeightGradQueue | None = None,
    ) -> None:
        if len(schedule) != axis.size:
            raise ValueError(f"a schedule for {len(schedule)} ranks on {axis}: make it with stages={axis.size}")
        validate(schedule)
        if weight_grads is None and any(action.kind == "W" for actions in schedule for action in actions):
            raise ValueError(
                "this schedule splits the backward pass: build the layers with a WeightGradQueue and pass it as "
                'weight_grads, or choose a schedule that does not ("1f1b")'
            )
        self.axis, self.device = axis, torch.device(device)
        self._weight_grads = weight_grads or WeightGradQueue()
        self._steps = program(schedule, axis.index)
        self._forwards = program(forward_only(schedule), axis.index)
        self._shake_hands(list(messages(schedule)))

    def run(
        self,
        forward: Forward,
        *,
        shape: Shape,
        dtype: torch.dtype,
        scale: float | torch.Tensor = 1.0,
        on_chunk_done: Callable[[int], None] | None = None,
    ) -> list[torch.Tensor]:
        """Forward and backward of every micro-batch; gradients are added to the parameters' `.grad`.

        Args:
            forward: (chunk, micro, hidden) -> output. `hidden` is None on the first global stage, else the previous
                stage's output. The last global stage returns the micro-batch's loss (scalar), others a hidden state.
            shape: of a hidden state, or a function of the micro-batch giving it. dtype: of hidden states.
            scale: gradient of every loss, for instance one over the global batch's tokens.
            on_chunk_done: called with a chunk as soon as all its gradients are complete.

        Returns:
            On the last rank the losses by micro-batch, detached and not scaled; elsewhere nothing.

        Raises:
            ValueError: a hidden state of another shape or dtype than announced. Whatever `forward` or a wait raises.
        """
        mail = self._mail(shape, dtype)
        alive: dict[tuple[int, int], tuple[torch.Tensor | None, GradientEdge | None]] = {}
        losses: dict[int, torch.Tensor] = {}
        try:
            for step in self._steps:
                kind, micro, chunk = step.action
                for message in step.post:
                    mail.post(message)
                if kind == "F":
                    alive[chunk, micro] = self._forward(forward, step, mail, shape, dtype, losses)
                elif kind == "W":
                    self._weight_grads.flush((chunk, micro))
                else:
                    self._backward(step, mail, *alive.pop((chunk, micro)), losses.get(micro), scale)
                if step.last and on_chunk_done is not None:
                    on_chunk_done(chunk)
            mail.finish()
        finally:
            self._weight_grads.clear()
        return [losses[micro] for micro in sorted(losses)]

    @torch.no_grad()
    def evaluate(self, forward: Forward, *, shape: Shape, dtype: torch.dtype) -> list[torch.Tensor]:
        """Only the forwards, without gradients. Arguments, result and errors as in `run`."""
        mail, losses = self._mail(shape, dtype), {}
        for step in self._forwards:
            for message in step.post:
                mail.post(message)
            self._forward(forward, step, mail, shape, dtype, losses)
        mail.finish()
        return [losses[micro] for micro in sorted(losses)]

    def _forward(
        self,
        forward: Forward,
        step: Step,
        mail: _Mail,
        shape: Shape,
        dtype: torch.dtype,
        losses: dict[int, torch.Tensor],
    ) -> tuple[torch.Tensor | None, GradientEdge | None]:
        """Run F; returns the input, whose `.grad` backward fills, and where backward starts."""
        _, micro, chunk = step.action
        hidden = None
        if step.receive is not None:
            hidden = mail.take(step.receive).requires_grad_(torch.is_grad_enabled())
        output = forward(chunk, micro, hidden)
        if step.send is None:
            losses[micro] = output.detach()
        else:
            expected = _shape(shape, micro)
            if tuple(output.shape) != expected or output.dtype != dtype:
                raise ValueError(
                    f"pipeline rank {self.axis.index}, chunk {chunk}, micro-batch {micro}: forward returned a hidden "
                    f"state of {tuple(output.shape)} {output.dtype} where {expected} {dtype} was announced; make the "
                    "stage return that, or announce its shape and dtype"
                )
            mail.put(step.send, output.detach())
        # A first stage of frozen parameters has nothing to differentiate.
        return hidden, get_gradient_edge(output) if output.requires_grad else None

    def _backward(
        self,
        step: Step,
        mail: _Mail,
        hidden: torch.Tensor | None,
        edge: GradientEdge | None,
        loss: torch.Tensor | None,
        scale: float | torch.Tensor,
    ) -> None:
        """Run B or I; parameters' gradients grow, the input's gradient goes to where the input came from."""
        kind, micro, chunk = step.action
        gradient = mail.take(step.receive) if step.receive is not None else torch.ones_like(loss) * scale
        with self._weight_grads.collect((chunk, micro)) if kind == "I" else nullcontext():
            if edge is not None:
                torch.autograd.backward(edge, gradient)
        if step.send is not None:
            mail.put(step.send, hidden.grad)

    def _mail(self, shape: Shape, dtype: torch.dtype) -> _Mail:
        return _Mail(self.axis, lambda micro: torch.empty(_shape(shape, micro), dtype=dtype, device=self.device))

    def _shake_hands(self, edges: list[tuple[int, int]]) -> None:
        """Use every edge once, in one order everywhere.

        NCCL makes a pair's communicator at its first message and blocks the host until the other side is there too; a
        receive posted ahead would then wait for a rank that is itself waiting for this one's next action.
        """
        for source, target in edges:
            token = torch.zeros(1, device=self.device)
            if source == self.axis.index:
                self.axis.isend(token, target).wait()
            elif target == self.axis.index:
                self.axis.irecv(token, source).wait()


def _shape(shape: Shape, micro: int) -> tuple[int, ...]:
    return tuple(shape(micro) if callable(shape) else shape)

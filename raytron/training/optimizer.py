"""AdamW on flat intervals: masters and moments of what this rank owns, updated in a few fused calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytron.config import OptimizerConfig

__all__ = ["FlatAdamW"]

Interval = tuple[int, int]


@dataclass(frozen=True)
class _Run:
    """A contiguous run of the buffer with one weight decay: [start, stop) there, from `at` in the shard."""

    start: int
    stop: int
    at: int
    decay: bool


class FlatAdamW:
    """AdamW (Loshchilov and Hutter 2019) over `intervals` of a flat weight buffer.

    State is flat, the concatenation of the intervals: `exp_avg`, `exp_avg_sq` and, when the weights are narrower than
    the gradients, `master`. Where weights are as wide as gradients they are their own masters and nothing is copied.

    Args:
        weights, grads: flat buffers of one length.
        intervals: what this rank updates.
        decay_end: elements before it are decayed, those behind it (norms, biases) are not.
    """

    def __init__(
        self, config: OptimizerConfig, weights: Tensor, grads: Tensor, intervals: Sequence[Interval], decay_end: int
    ) -> None:
        self.config, self.weights, self.grads = config, weights, grads
        self._runs = list(_runs(intervals, decay_end))
        size = sum(stop - start for start, stop in intervals)
        self.state: dict[str, Tensor] = {name: grads.new_zeros(size) for name in ("exp_avg", "exp_avg_sq")}
        if weights.dtype != grads.dtype:
            self.state["master"] = grads.new_empty(size)
        self._host: dict[str, Tensor] = {}
        self.copy_masters()

    def copy_masters(self) -> None:
        """Take masters from the weights, as at the start of a run."""
        if "master" in self.state:
            for run in self._runs:
                self._shard("master", run).copy_(self.weights[run.start : run.stop])

    def shelve(self) -> None:
        """Move the state to host memory, where it is found in `state`; on the CPU it is there."""
        for name, tensor in self.state.items():
            if tensor.is_cuda:
                if name not in self._host:  # pinned, and kept: it is for every step
                    self._host[name] = torch.empty_like(tensor, device="cpu", pin_memory=True)
                self.state[name] = self._host[name].copy_(tensor)

    def unshelve(self) -> None:
        """Bring it back."""
        for name, tensor in self.state.items():
            self.state[name] = tensor.to(self.grads.device)

    def _shard(self, name: str, run: _Run) -> Tensor:
        return self.state[name][run.at : run.at + run.stop - run.start]

    @torch.no_grad()
    def step(self, lr: float, updates: int, grad_divisor: float) -> None:
        """Update in place with gradients / `grad_divisor`; `updates` counts this one (from 1), for bias correction."""
        for decay in (True, False):
            runs = [run for run in self._runs if run.decay is decay]
            if runs:
                self._update(runs, lr, updates, grad_divisor, self.config.weight_decay if decay else 0.0)
        if "master" in self.state:
            for run in self._runs:
                self.weights[run.start : run.stop].copy_(self._shard("master", run))

    def _update(self, runs: list[_Run], lr: float, updates: int, divisor: float, decay: float) -> None:
        own = "master" in self.state
        masters = [self._shard("master", run) if own else self.weights[run.start : run.stop] for run in runs]
        grads = [self.grads[run.start : run.stop] for run in runs]
        if self.grads.dtype == torch.float64:  # the fused kernel scales in fp32
            torch._foreach_div_(grads, divisor)
        scale = None if self.grads.dtype == torch.float64 else torch.tensor(divisor, device=self.grads.device)
        steps = [torch.tensor(float(updates), device=self.grads.device) for _ in runs]
        torch._fused_adamw_(
            masters,
            grads,
            [self._shard("exp_avg", run) for run in runs],
            [self._shard("exp_avg_sq", run) for run in runs],
            [],
            steps,
            lr=lr,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            weight_decay=decay,
            eps=self.config.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
            found_inf=None,
        )


def _runs(intervals: Sequence[Interval], decay_end: int):
    at = 0
    for start, stop in intervals:
        middle = min(max(start, decay_end), stop)
        if start < middle:
            yield _Run(start, middle, at, True)
        if middle < stop:
            yield _Run(middle, stop, at + middle - start, False)
        at += stop - start

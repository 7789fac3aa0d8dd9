"""Weight gradients that can wait.

A zero-bubble schedule (Qi et al. 2024) splits the backward pass: the gradient of a layer's input goes back at once, the
gradient of its weight is computed later, when the rank would be idle. The backward of a linear layer asks the queue it
was built with:

    grad_TD = grad_TE @ weight_ED
    if queue is None or not queue.active:
        return grad_TD, grad_TE.T @ x_TD
    queue.push(lambda: accumulate(weight_ED, grad_TE.T @ x_TD))  # adds to weight_ED.grad
    return grad_TD, None

One queue is made per rank and handed to every layer of its model and to `Pipeline`. It is an object that is passed, not
a context variable or thread-local: autograd runs CUDA backwards on threads of its own, which would not see either.
Rejected: finding the weights' nodes in the autograd graph and running it twice (torch.distributed.pipelining), which
depends on how torch names and links its nodes.

Parameters outside such layers (norms, embeddings) get their gradients at once. `torch.compile` traces a backward ahead
of time, when `active` is a constant: layers inside a compiled region can't defer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["WeightGradQueue"]


class WeightGradQueue:
    """Closures that compute weight gradients, kept under the key of the backward pass that left them."""

    def __init__(self) -> None:
        self._collecting: list[Callable[[], None]] | None = None
        self._waiting: dict[Hashable, list[Callable[[], None]]] = {}

    @property
    def active(self) -> bool:
        """Whether a backward pass under way wants its weight gradients later."""
        return self._collecting is not None

    def push(self, compute: Callable[[], None]) -> None:
        """Keep `compute`, which adds one weight gradient to its parameter's `.grad`. Only while `active`."""
        assert self._collecting is not None, "push outside of collect: compute the weight gradient at once"
        self._collecting.append(compute)

    @contextmanager
    def collect(self, key: Hashable) -> Iterator[None]:
        """Be active, and keep what is pushed under `key`."""
        assert not self.active, "collect does not nest"
        assert key not in self._waiting, f"weight gradients of {key} are already waiting"
        self._collecting = self._waiting[key] = []
        try:
            yield
        finally:
            self._collecting = None

    @torch.no_grad()
    def flush(self, key: Hashable) -> None:
        """Run what was pushed under `key`, in that order; each closure's tensors are free once it has run."""
        waiting = self._waiting.pop(key)[::-1]
        while waiting:
            waiting.pop()()

    def clear(self) -> None:
        """Forget everything that waits."""
        self._waiting.clear()

"""The group that hosts a training task: an elastic group whose calls keep the ranks busy.

The task, made by `factory(world, ...)`, is asked for: `train_step() -> dict | None` (metrics on one rank, None
elsewhere), `evaluate()`, `save()`, `load(...)`, `close()`. What they mean is the task's affair.

Latency is hidden in two ways. Steps are submitted ahead of their results, so ranks never wait for the driver; and steps
much shorter than a message is worth are sent several to a message, since on a small machine the driver's own work takes
cores away from the ranks. A step that takes longer than `MESSAGE_S` always travels alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from raytron.actors.calls import Calls
from raytron.actors.reseating import ElasticGroup
from raytron.config import ScalingConfig
from raytron.parallel.mesh import Mesh

__all__ = ["TrainerGroup", "per_message", "resources"]

MESSAGE_S = 0.25  # work per message worth aiming at: results arrive this often, and so does a wish to stop
MOST = 64  # steps to a message
AHEAD = 2  # messages under way: one runs while the next one waits on the ranks


def resources(scaling: ScalingConfig) -> dict[str, float]:
    """What one rank reserves, by Ray's names: one CPU slot, and one GPU with `use_gpu`, unless told otherwise."""
    each = dict(scaling.resources_per_worker or {"CPU": 1.0})
    if scaling.use_gpu:
        each.setdefault("GPU", 1.0)
    if scaling.accelerator_type:
        each[f"accelerator_type:{scaling.accelerator_type}"] = 0.001  # Ray's own convention
    return each


def per_message(step_s: float) -> int:
    """How many steps to send at once, given how long one takes; powers of two, so that it settles."""
    fit = 1
    while fit < MOST and 2 * fit * step_s <= MESSAGE_S:
        fit *= 2
    return fit


class TrainerGroup(ElasticGroup):
    """Actors for the ranks of `mesh`, with the resources and strategy of `scaling`; then `create(factory, ...)`.

    Other arguments are `ActorGroup`'s.

    Raises:
        ValueError: the mesh has not the number of ranks `scaling` asks for.
    """

    def __init__(self, mesh: Mesh, scaling: ScalingConfig | None = None, **options: Any) -> None:
        scaling = scaling or ScalingConfig(num_workers=mesh.size)
        low, high = scaling.bounds
        if not low <= mesh.size <= high:
            raise ValueError(
                f"scaling.num_workers is {scaling.num_workers} but the mesh has dp x pp x cp x tp = {mesh.size} ranks; "
                "make num_workers a multiple of tp x pp x cp"
            )
        super().__init__(mesh, resources(scaling), strategy=scaling.placement_strategy, **options)

    def step(self) -> Mapping[str, Any]:
        """One training step, waited for."""
        return _first(self.call("train_step"))

    def steps(self, count: int, stop: Callable[[], bool] = lambda: False) -> Iterator[Mapping[str, Any]]:
        """The metrics of `count` steps, in order, as they become known.

        Steps run ahead of what has been yielded by at most `AHEAD` messages, and never past `count`. Once `stop()` is
        true nothing more is sent, and what is under way is still yielded: take everything, or the metrics of steps that
        did run are lost.
        """
        underway: deque[Calls] = deque()
        sent, size = 0, 1
        while True:
            while sent < count and len(underway) < AHEAD and not stop():
                size = min(size, count - sent)
                underway.append(self._repeat("train_step", size))
                sent += size
            if not underway:
                return
            steps_of, seconds = zip(*underway.popleft().results(), strict=True)
            size = per_message(max(seconds) / len(steps_of[0]))
            yield from map(_first, zip(*steps_of, strict=True))

    def _repeat(self, method: str, times: int) -> Calls:
        self._check()
        return self._fan_out("repeat", None, lambda _: (method, times), name=method)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Held-out loss, from the rank that knows it."""
        return _first(self.call("evaluate", *args, **kwargs))

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """Save the training state; returns what the task's `save` says, from the first rank that says something."""
        return _first(self.call("save", *args, **kwargs))

    def load(self, *args: Any, **kwargs: Any) -> Any:
        """Load a training state."""
        return _first(self.call("load", *args, **kwargs))


def _first(results: Any) -> Any:
    return next((r for r in results if r is not None), None)

"""What a task does with its checkpoints: save in the background, and tell once of a save that failed."""

from __future__ import annotations

from concurrent.futures import Future

from raytron.checkpoint import CheckpointManager, Saved
from raytron.config import CheckpointConfig
from raytron.training.engine import TrainEngine

__all__ = ["Saves"]


class Saves:
    """One rank's saves of `engine`; every method but `failed` is collective over its world.

    Args:
        engine: what is saved and loaded; None for now where it comes later (`serve`).
        location: folder or URI of the run's checkpoints.
        policy: how many to keep, and how to write them.
        tokenizer: directory whose tokenizer every saved model gets.
    """

    def __init__(
        self, engine: TrainEngine | None, location: str, policy: CheckpointConfig, tokenizer: str | None = None
    ) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._manager = CheckpointManager(
            location, keep=policy.num_to_keep, asynchronous=policy.asynchronous, shard_mb=policy.shard_mb
        )
        self._underway: Future[Saved] | None = None  # on rank 0, a save whose end nobody has heard of

    def serve(self, engine: TrainEngine | None) -> None:
        """Save and load another engine from now on. A save of the last one that is still under way ends by itself, or
        fails with its world; it never becomes one of this engine. Local."""
        self._engine = engine
        self._manager.forget()

    def load(self, most: int | None = None) -> list[str] | None:
        """Fill the engine from the newest good checkpoint (most: of this step or before), whatever its layout.

        Returns what was wrong with newer ones that were passed over, None where there is no checkpoint.
        """
        record = self._manager.load(self._engine, most)
        if record is None:
            return None
        self._engine.record = record
        return list(self._manager.passed_over.values())

    def save(self, wait: bool = False) -> str | None:
        """Save the committed step, in the background unless `wait`, once the save before has ended.

        Returns, on rank 0, what failed of the saves that have ended and were not heard of (training goes on).
        """
        future = self._manager.save(self._engine, tokenizer=self._tokenizer)
        failed, self._underway = self.failed(), future if self._engine.world.rank == 0 else None
        if wait:
            future.result()
            failed = "; ".join(filter(None, (failed, self.failed())))
        return failed or None

    def failed(self) -> str | None:
        """Why the last save failed, once it has ended; told once, on rank 0."""
        if self._underway is None or not self._underway.done():
            return None
        saved, self._underway = self._underway.result(), None
        return None if saved.ok else f"checkpoint {saved.name} was not saved: {saved.error}"

    def latest(self) -> str | None:
        """Where the newest checkpoint is, once every save has ended."""
        self._manager.wait()
        return self._manager.latest()

    def close(self) -> None:
        """Finish saving."""
        self._manager.close()

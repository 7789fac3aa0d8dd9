"""A trainer rank in whose push somebody is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from raytron.rl.task import PolicyTask


class HalfWay(PolicyTask):
    """When half of a push is written, kills the process that the file `victim` of the run's folder names; once."""

    def publish(self, turn: int, delta: bool = False) -> Any:
        file = Path(self.config.run.storage_path, self.config.run.name, "victim")
        if not file.exists():
            return super().publish(turn, delta)
        victim = int(file.read_text())
        file.unlink()
        progress = self._publisher._shared.progress
        writing, seal = progress.writing, progress.seal

        def sealed(*args: Any) -> None:
            os.kill(victim, signal.SIGKILL)
            seal(*args)

        progress.writing = lambda writer, turn, limit: writing(writer, turn, limit // 2)
        progress.seal = sealed
        try:
            return super().publish(turn, delta)
        finally:
            del progress.writing, progress.seal

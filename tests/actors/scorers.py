"""A scorer that fails when it is told to."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raytron.inference import Scorer


class Failing(Scorer):
    """Ends, or comes to a halt, in the way that a file beside the model names; once, unless it says "always"."""

    def __init__(self, world: Any, path: str | Path, *args: Any) -> None:
        super().__init__(world, path, *args)
        self._file = Path(path, "fail")

    def score(self, sequences: Sequence[Sequence[int]]) -> np.ndarray | None:
        if self._model.world.rank == 0 and self._file.exists():
            how = self._file.read_text()
            if how != "always":
                self._file.unlink()
            if how == "hang":
                threading.Event().wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(sequences)

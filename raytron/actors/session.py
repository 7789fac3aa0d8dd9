"""Ray for the length of a run.

A run joins the cluster it was pointed at: one this process is already connected to, or `RAY_ADDRESS`, which is also how
`ray job submit` tells its entrypoint. Anything else is a laptop run: it starts its own Ray, never looking for a cluster
that happens to be up on the machine, with at least as many CPU slots as it has ranks, since ranks that share a core are
slow and not wrong. Only what was started here is shut down here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from types import TracebackType

import ray

from raytron.actors.worker import cores

__all__ = ["Session"]

# A local run watches itself: no metrics to scrape, and a dead node is noticed in two seconds, not in sixteen.
LOCAL = {
    "enable_metrics_collection": False,
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
    "worker_niceness": 0,  # Ray's 15 would let anything else on the machine go before the ranks
}
SOCKET_PATH = 107  # bytes of a Unix socket's path
SOCKET_TAIL = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.12")


class Session:
    """A connection to Ray, made when constructed and closed by `close` or at the end of a `with` block.

    Args:
        slots: CPU slots a local Ray must offer; a rank takes one by default.
        gpus: GPUs a local Ray must offer; by default those it finds.
        log_to_driver: repeat what workers print.
        temp_dir: where a local Ray keeps sockets and logs; by default Ray's own choice, while that is usable.

    Attributes:
        owned: a local Ray was started, and will be shut down. It cannot grow: what it lacks now it will always lack.
    """

    def __init__(
        self, slots: int = 1, *, gpus: int | None = None, log_to_driver: bool = False, temp_dir: str | None = None
    ) -> None:
        self._made: str | None = None
        self._joined = ray.is_initialized()
        self.owned = not self._joined and not os.environ.get("RAY_ADDRESS")
        if self.owned:
            self._start(slots, gpus, log_to_driver, temp_dir)
        elif not self._joined:
            ray.init(log_to_driver=log_to_driver, logging_level="ERROR")

    @property
    def wait_s(self) -> float:
        """How long it makes sense to wait for the cluster to grant seats."""
        return 2.0 if self.owned else 30.0

    def close(self) -> None:
        """Disconnect; stop the local Ray, if one was started, and remove its files."""
        if not self._joined:
            ray.shutdown()
            self._joined = True
        if self._made:
            shutil.rmtree(self._made, ignore_errors=True)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _start(self, slots: int, gpus: int | None, log_to_driver: bool, temp_dir: str | None) -> None:
        if temp_dir is None and not _usable(_default_root()):
            temp_dir = self._made = tempfile.mkdtemp(prefix="raytron-", dir="/tmp")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=max(cores(), slots),
            num_gpus=gpus,
            include_dashboard=False,
            log_to_driver=log_to_driver,
            logging_level="ERROR",
            _temp_dir=temp_dir,
            _system_config=LOCAL,
        )


def _default_root() -> str:
    """Where Ray would make its folder `ray`."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def _usable(root: str) -> bool:
    """Whether Ray's sockets fit a path under `root`, and its folder there is not somebody else's."""
    default = os.path.join(root, "ray")
    writable = os.access(default if os.path.exists(default) else root, os.W_OK | os.X_OK)
    return writable and len(os.fsencode(os.path.abspath(root))) + SOCKET_TAIL <= SOCKET_PATH

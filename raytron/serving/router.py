"""Ray Serve's place for `routing`: a request router that follows prompts to the replica that knows their beginning."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from raytron.serving.routing import PrefixMap

__all__ = ["PrefixRouter"]


class PrefixRouter(RequestRouter):
    """Requests whose first argument has a `prompt` go by prefix and load; anything else to the least loaded.

    Loads are Serve's: requests sent to a replica from here that have not come back, corrected by what replicas say.
    """

    def initialize_state(self, **options: Any) -> None:
        """See `PrefixMap`'s arguments."""
        self._prefixes = PrefixMap(**options)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """See `RequestRouter`."""
        super().update_replicas(replicas)
        self._prefixes.keep({replica.replica_id.unique_id for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranked: the one chosen, then all others; of those in one rank Serve takes the one with fewest requests."""
        ask = pending_request.args[0] if pending_request is not None and pending_request.args else None
        prompt = getattr(ask, "prompt", None)
        if prompt is None or len(candidate_replicas) < 2 or ask.attempt:  # an attempt failed: anywhere but there
            return [candidate_replicas]
        loads = {
            r.replica_id.unique_id: self.replica_queue_len_cache.get(r.replica_id) or 0 for r in candidate_replicas
        }
        chosen = self._prefixes.send(prompt, loads)
        return [
            [r for r in candidate_replicas if r.replica_id.unique_id == chosen],
            [r for r in candidate_replicas if r.replica_id.unique_id != chosen],
        ]

"""Ray Serve's place for `routing`: a request router that follows prompts to the replica that knows their beginning."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from raytron.serving.routing import PrefixMap

__all__ = ["PrefixRouter"]


class PrefixRouter(RequestRouter):
    """Requests whose first argument has a `prompt` go by prefix and load; anything else to the least loaded.

    Loads are requests sent to a replica from here that have not come back. Serve's own count is not used: by gRPC it
    hears a replica's queue length only with the answer, when it is out of date.
    """

    def initialize_state(self, **options: Any) -> None:
        """See `PrefixMap`'s arguments."""
        self._prefixes = PrefixMap(**options)
        self._flying: Counter[str] = Counter()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """See `RequestRouter`."""
        super().update_replicas(replicas)
        names = {replica.replica_id.unique_id for replica in replicas}
        self._prefixes.keep(names)
        for gone in self._flying.keys() - names:
            del self._flying[gone]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """See `RequestRouter`."""
        super().on_send_request(replica_id)
        self._flying[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """See `RequestRouter`. It may be called for a request that was never sent."""
        super().on_request_completed(replica_id, internal_request_id)
        self._flying[replica_id.unique_id] = max(0, self._flying[replica_id.unique_id] - 1)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranked: the one chosen, then all others; of those in one rank Serve takes the one with fewest requests."""
        ask = pending_request.args[0] if pending_request is not None and pending_request.args else None
        prompt = getattr(ask, "prompt", None)
        if prompt is None or len(candidate_replicas) < 2 or ask.attempt:  # an attempt failed: anywhere but there
            return [candidate_replicas]
        loads = {r.replica_id.unique_id: self._flying[r.replica_id.unique_id] for r in candidate_replicas}
        chosen = self._prefixes.send(prompt, loads)
        return [
            [r for r in candidate_replicas if r.replica_id.unique_id == chosen],
            [r for r in candidate_replicas if r.replica_id.unique_id != chosen],
        ]

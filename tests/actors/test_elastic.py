"""What is made of a fault, whoever noticed it first, before anything is decided."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from raytron.actors import ActorGroup, WorkerError
from raytron.actors import elastic as module
from raytron.actors.elastic import Elastic
from raytron.actors.failures import DIED, GONE, BrokenError
from raytron.actors.members import living_nodes
from raytron.actors.moves import Spent, Survivors
from raytron.actors.policy import Decision, Replace, Wait
from raytron.parallel import Mesh


def test_what_the_watch_noticed_between_two_calls_is_a_fault_like_any_other(group: ActorGroup):
    group.abandon("rank 1 hangs")  # as the watch does, in its own thread
    elastic, faults = object.__new__(Elastic), []
    elastic.group = SimpleNamespace(evaluate=lambda: group.call("where_am_i"))
    elastic._control = SimpleNamespace(begins=lambda: None)

    def recover(error: WorkerError) -> None:
        faults.append(error)
        elastic.group = SimpleNamespace(evaluate=lambda: "held-out loss")

    elastic._recover = recover
    with pytest.raises(BrokenError, match="rank 1 hangs"):
        elastic.group.evaluate()
    assert elastic.call("evaluate") == "held-out loss"
    assert [error.failure.kind for error in faults] == ["BrokenError"]
    assert "rank 1 hangs" in str(faults[0])


def test_actors_that_died_went_with_their_node_once_that_is_gone(group: ActorGroup):
    (here,) = living_nodes()
    elastic = object.__new__(Elastic)
    elastic._mover = SimpleNamespace(nodes={"actor-0": here, "actor-1": "a node that is gone"})
    elastic._control = SimpleNamespace(watch=SimpleNamespace(hung={}))
    # Seats on it would be waited for without end.
    assert [elastic._how(place, DIED) for place in elastic._mover.nodes] == ["died", "node"]
    assert elastic._how("actor-0", GONE) == "node"


def test_newcomers_on_their_way_end_the_waiting_for_seats_that_only_they_have(monkeypatch):
    elastic, notes = object.__new__(Elastic), []
    elastic.group = SimpleNamespace(spares=[], recruiting_s=1.0)
    elastic._control = SimpleNamespace(decided=notes.append, note=lambda *a, **k: None, seated=lambda group: None)
    elastic._mover = SimpleNamespace(missing=lambda decision: 1)
    elastic._stop, elastic._waiting_since_s, elastic._newcomers = threading.Event(), None, Future()
    elastic._state = lambda lost, covered: len(elastic.group.spares)
    elastic._ask_for_room = lambda state: None

    def decide(spares: int) -> Decision:
        if not spares:  # they arrive meanwhile
            elastic._newcomers.set_result([SimpleNamespace(name="actor-4")])
        return Decision(Replace(("actor-1",), "spare") if spares else Wait(0.01), "because", Mesh(dp=2))

    monkeypatch.setattr(module, "decide", decide)
    left = Survivors({"actor-1": DIED}, None, covered=True)
    assert isinstance(elastic._decided(left, Spent(), WorkerError(None)).action, Replace)
    assert [type(decision.action) for decision in notes] == [Wait, Replace]

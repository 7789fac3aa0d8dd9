"""Whom verdicts of the engines make suspicious, and whom they must not."""

from __future__ import annotations

from types import SimpleNamespace

from raytron.actors.policy import Fault
from raytron.actors.suspects import Suspects
from raytron.training.guard import Verdict

MEMBERS = [
    SimpleNamespace(name=f"actor-{i}", where=SimpleNamespace(host=f"h{i // 2}", pid=10 + i, node=f"n{i // 2}"))
    for i in range(4)
]


def judged(suspects: Suspects, *ranks: int, **how) -> list[Fault]:
    hosts = tuple((MEMBERS[rank].where.host, MEMBERS[rank].where.pid) for rank in ranks)
    verdict = Verdict(**{"kind": "hardware", "what": "non-finite", "ranks": ranks, "hosts": hosts, **how})
    return suspects.judged(verdict.told(), reversed(MEMBERS), 5.0)  # they have moved since


def test_the_second_moment_of_a_place_makes_it_faulty_and_each_is_held_against_its_node():
    suspects = Suspects()
    assert judged(suspects, 2) == [Fault(5.0, "n1", "numbers", ("actor-2",))]
    assert judged(suspects, 3) == [Fault(5.0, "n1", "numbers", ("actor-3",))]
    assert not suspects.faulty
    judged(suspects, 2)
    assert suspects.faulty == {"actor-2"}


def test_what_is_wrong_again_when_repeated_is_faulty_at_once():
    suspects = Suspects()
    judged(suspects, 1, lasting=True)
    assert suspects.faulty == {"actor-1"}


def test_nobody_is_blamed_for_data_or_on_suspicion():
    suspects = Suspects()
    for _ in range(2):
        assert judged(suspects, kind="data") == []
        assert judged(suspects, 0, 2, sure=False, lasting=True) == []
        assert judged(suspects) == []  # nobody in particular
    assert not suspects.faulty

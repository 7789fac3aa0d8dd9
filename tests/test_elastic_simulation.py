"""The elastic simulation keeps its books, and knows what it is about: at the size of a small cluster."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from raytron.parallel.mesh import Mesh

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
MESH, PER_NODE = Mesh(dp=8, pp=2, tp=2), 4
OFTEN = 5e3  # times the published rate: a fault in twenty minutes on 32 ranks
DAY = 86400.0


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    sys.path.insert(0, BENCHMARKS)
    try:
        return importlib.import_module("elastic_simulation")
    finally:
        sys.path.remove(BENCHMARKS)


@pytest.fixture(autouse=True)
def quick_repair(simulation: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """So that a small cluster under many faults always has some nodes."""
    monkeypatch.setattr(simulation, "REPAIR_S", 1200.0)


@pytest.mark.parametrize("name", ["RESTART", "IN_PLACE", "TWIN", "SPARE"])
def test_every_rank_second_is_useful_or_lost_to_something(simulation: ModuleType, name: str):
    way = replace(getattr(simulation, name), rate=OFTEN, stand_s=20.0, warm=2 if name == "SPARE" else 0)
    ran = simulation.Run(way, 1, MESH, PER_NODE).over(DAY)
    assert ran.useful + sum(ran.lost.values()) == pytest.approx(1, abs=1e-9)
    assert 0 < ran.useful < 1
    assert ran.events["fault"] > 20
    again = simulation.Run(way, 1, MESH, PER_NODE).over(DAY)
    assert (again.useful, again.lost) == (ran.useful, ran.lost)


def test_without_faults_only_the_insurance_and_the_spare_nodes_cost(simulation: ModuleType, monkeypatch):
    monkeypatch.setattr(simulation, "PLANNED", 1e-30)
    run = simulation.Run(replace(simulation.TWIN, rate=1e-20, interval_s=600.0), 0, MESH, PER_NODE)
    ran = run.over(3600.0)
    insured = simulation.BLOCKED_S / 600.0 + simulation.TWINS
    assert ran.useful == pytest.approx((1 - insured) * MESH.size / (MESH.size + 4 * PER_NODE))
    assert not ran.events


def test_twins_redo_at_most_a_step_for_a_fault(simulation: ModuleType):
    one = replace(simulation.TWIN, rate=OFTEN, stand_s=20.0, interval_s=3600.0)
    run = simulation.Run(one, 3, MESH, PER_NODE)
    twins, plain = run.over(DAY), simulation.Run(replace(one, twins=False), 3, MESH, PER_NODE).over(DAY)
    assert twins.events["fault"] > 20
    if not twins.events["rewound"]:
        assert twins.lost["done again"] * run.reserved * DAY <= twins.events["fault"] * simulation.STEP_S * MESH.size
    assert plain.events["rewound"] > 0
    assert plain.lost["done again"] > twins.lost["done again"]


def test_a_shard_and_its_twin_lost_together_are_not_covered(simulation: ModuleType):
    run = simulation.Run(simulation.TWIN, 0, MESH, PER_NODE)
    places = [place for place, _ in run.cluster.seated]
    run.cluster.lose({places[1]}, "died")
    assert run._covered()
    run.cluster.lose({places[1 + MESH.size // 2]}, "died")
    assert not run._covered()

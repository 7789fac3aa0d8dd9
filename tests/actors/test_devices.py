"""Which GPU a rank sees and uses."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raytron.actors import Devices, share


def test_every_rank_sees_its_nodes_gpus_and_ranks_follow_gpu_ids():
    seen = share([("a", ("3",)), ("a", ("1",)), ("b", ("0",)), ("a", ("10",))])
    assert [d.visible for d in seen] == [("1", "3", "10")] * 2 + [("0",)] + [("1", "3", "10")]
    assert [d.name for d in seen] == ["cuda:0", "cuda:1", "cuda:0", "cuda:2"]


def test_without_gpus_there_is_the_cpu():
    assert share([("a", ()), ("b", ())]) == (Devices((), None),) * 2
    assert share([("a", ())])[0].name == "cpu"


def test_a_shared_gpu_is_used_by_both_ranks():
    assert [d.used for d in share([("a", ("0",)), ("a", ("1",)), ("a", ("0",)), ("a", ("1",))])] == ["0", "0", "1", "1"]


def test_several_gpus_per_rank():
    assert [d.used for d in share([("a", ("2", "3")), ("a", ("0", "1"))])] == ["0", "2"]


@given(st.permutations(range(8)), st.lists(st.sampled_from("ab"), min_size=8, max_size=8), st.integers(0, 7))
def test_devices_are_a_matching_and_a_replaced_rank_gets_its_predecessors(gpus: list[int], on: list[str], lost: int):
    where = [(node, (str(gpu),)) for node, gpu in zip(on, gpus, strict=True)]
    devices = share(where)
    for node in "ab":
        granted = {w[1][0] for w in where if w[0] == node}
        used = [d.used for d, w in zip(devices, where, strict=True) if w[0] == node]
        assert sorted(used) == sorted(granted)
    survivors = {rank: d for rank, d in enumerate(devices) if rank != lost}
    assert share(where, survivors) == devices

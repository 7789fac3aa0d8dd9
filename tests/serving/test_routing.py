"""Prefix-aware routing: affinity, balance, agreement, bounded memory."""

from hypothesis import given
from hypothesis import strategies as st

from raytron.serving.routing import PrefixMap, choose

LOADS = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 100), min_size=1)


@given(LOADS, st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9)), st.integers(0, 20), st.integers())
def test_the_choice_is_near_balance_and_holds_the_most_among_those_that_are(loads, matches, slack, tie):
    chosen = choose(matches, loads, slack, tie)
    near = [r for r, load in loads.items() if load <= min(loads.values()) + slack]
    assert chosen in near
    assert matches.get(chosen, 0) == max(matches.get(r, 0) for r in near)


@given(LOADS, st.integers(0, 20))
def test_without_prefixes_the_least_loaded_is_chosen(loads, slack):
    assert loads[choose({}, loads, slack)] == min(loads.values())


def test_conversations_stay_where_they_began_and_spread_over_replicas():
    prefixes, loads = PrefixMap(block=4), {"a": 0, "b": 0, "c": 0}
    starts = [[seed] * 8 for seed in range(30)]
    homes = [prefixes.send(start, loads) for start in starts]
    assert set(homes) == set(loads)
    for turn in range(1, 5):
        longer = [start + [seed + 1000] * 4 * turn for seed, start in enumerate(starts)]
        assert [prefixes.send(prompt, loads) for prompt in longer] == homes


def test_two_routers_agree_on_new_prompts():
    loads = {"a": 3, "b": 3, "c": 3}
    prompts = [[seed, *range(40)] for seed in range(50)]
    assert [PrefixMap().send(p, loads) for p in prompts] == [PrefixMap().send(p, loads) for p in prompts]


def test_a_popular_prefix_spreads_once_its_replica_is_too_busy():
    prefixes, loads = PrefixMap(block=4, slack=2), {"a": 0, "b": 0}
    for _ in range(40):
        loads[prefixes.send([7] * 16, loads)] += 1
    assert abs(loads["a"] - loads["b"]) <= 3


def test_the_longest_prefix_wins():
    prefixes = PrefixMap(block=4)
    prefixes.send([1] * 8, {"a": 0})
    prefixes.send([1] * 8 + [2] * 8, {"b": 0})
    assert prefixes.send([1] * 8 + [2] * 8 + [3] * 8, {"a": 0, "b": 0}) == "b"
    assert prefixes.send([1] * 8 + [4] * 8, {"a": 0, "b": 1}) == "a"


def test_gone_replicas_are_forgotten_and_memory_is_bounded():
    prefixes = PrefixMap(block=1, depth=4, remember=100)
    for seed in range(1000):
        prefixes.send([seed, seed, seed, seed], {"a": 0, "b": 0})
    assert len(prefixes) == 100
    prefixes.keep({"b"})
    assert 0 < len(prefixes) < 100
    prefixes.keep(())
    assert len(prefixes) == 0

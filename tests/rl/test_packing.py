"""Any cut of a batch holds every chosen token once, with its numbers beside it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.rl.packing import beginnings, distribute, micro_batches, pack
from raytron.rl.types import Batch, Group, Trajectory

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def batch_of(lengths: list[int], seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    trajectories = []
    for length in lengths:
        tokens = random.integers(1, 50, length + 1)
        chosen = random.random(length + 1) < 0.6
        chosen[0], chosen[-1] = False, True
        logprobs = np.where(chosen, random.normal(size=length + 1), 0)
        trajectories.append(Trajectory(tokens, chosen, logprobs, np.where(chosen, 0, -1), 1.0))
    batch = Batch.of([Group(i, (t,)) for i, t in enumerate(trajectories)])
    return batch.having(weights=random.normal(size=batch.tokens.shape))


@given(LENGTHS, st.integers(1, 5))
def test_ranks_share_all_trajectories_and_no_load_exceeds_another_by_more_than_one_trajectory(lengths, ranks):
    shares = distribute(np.array(lengths), ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


@given(LENGTHS, st.integers(1, 40), st.booleans())
def test_no_micro_batch_exceeds_the_budget_but_for_one_long_trajectory(lengths, budget, packed):
    found = pack(np.array(lengths), range(len(lengths)), budget, packed)
    assert sorted(i for lines in found for line in lines for i in line) == list(range(len(lengths)))
    for lines in found:
        widths = [sum(lengths[i] for i in line) for line in lines]
        assert len(lines) * max(widths) <= budget or sum(map(len, lines)) == 1


@given(LENGTHS, st.integers(1, 40), st.booleans(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_every_chosen_token_is_predicted_once_from_the_token_before_it(lengths, budget, packed, multiple, count, seed):
    batch = batch_of(lengths, seed)
    found = micro_batches(batch, range(len(batch)), budget, packed=packed, multiple_of=multiple, count_of=count)
    assert len(found) % count == 0
    seen = []
    for micro in found:
        assert micro.tokens_BS.numel() % multiple == 0
        index = micro.fields_BS["index"]
        inside = index >= 0
        assert not micro.loss_mask_BS[~inside].any()
        assert not micro.fields_BS["weights"][~inside].any()
        at = index[inside].numpy()
        seen += at.tolist()
        assert (micro.labels_BS[inside].numpy() == batch.tokens[at]).all()
        assert (micro.tokens_BS[inside].numpy() == batch.tokens[at - 1]).all()
        assert (micro.loss_mask_BS[inside].numpy() == batch.chosen[at]).all()
        assert (micro.fields_BS["behaviour"][inside].numpy() == batch.logprobs[at]).all()
        assert (micro.fields_BS["weights"][inside].numpy() == batch.fields["weights"][at]).all()
        rows, sequence = batch.rows[at], micro.fields_BS["sequence"][inside].numpy()
        assert len(set(zip(rows, sequence, strict=True))) == len(set(rows)) == len(set(sequence))
        assert micro.fields_BS["sequences"].numel() > micro.fields_BS["sequence"].max()
        if packed:
            first = batch.starts[rows]
            assert (micro.position_ids_BS[inside].numpy() == at - 1 - first).all()
    assert sorted(seen) == [i for i in range(len(batch.tokens)) if i not in set(batch.starts)]


def groups_of(prompts: list[tuple[int, int]], seed: int) -> Batch:
    """A group for each (tokens of the prompt, answers)."""
    random = np.random.default_rng(seed)
    groups = []
    for number, (size, answers) in enumerate(prompts):
        prompt, trajectories = random.integers(1, 4, size), []
        for length in random.integers(1, 8, answers):
            tokens = np.concatenate((prompt, random.integers(1, 50, length)))
            chosen = np.arange(len(tokens)) >= size
            trajectories.append(Trajectory(tokens, chosen, np.where(chosen, -1.0, 0), np.where(chosen, 0, -1), 1.0))
        groups.append(Group(number, tuple(trajectories)))
    batch = Batch.of(groups)
    return batch.having(weights=random.normal(size=batch.tokens.shape) * batch.chosen)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=5),
    st.integers(1, 60),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_a_shared_prompt_is_computed_once_and_seen_by_every_answer(prompts, budget, ranks, seed):
    """What a position sees (its document's tokens up to it, its parent's before them) is its trajectory up to there."""
    batch = groups_of(prompts, seed)
    shared = beginnings(batch)
    shares = distribute(batch.lengths, ranks, shared)
    assert sorted(i for share in shares for i in share) == list(range(len(batch)))
    seen, places = [], 0
    for share in filter(None, shares):
        for micro in micro_batches(batch, share, budget, packed=True, shared=shared):
            tokens, index, documents, parents, positions = (
                x.numpy().reshape(-1)
                for x in (
                    micro.tokens_BS, micro.fields_BS["index"], micro.document_ids_BS, micro.parent_ids_BS,
                    micro.position_ids_BS,
                )
            )  # fmt: skip
            places += int((documents != -1).sum())
            for at in np.flatnonzero(index >= 0):
                before = np.arange(len(tokens)) <= at
                context = tokens[before & ((documents == documents[at]) | (documents == parents[at]))]
                start = batch.starts[batch.rows[index[at]]]
                assert (context == batch.tokens[start : index[at]]).all()
                assert positions[at] == index[at] - 1 - start
                assert micro.labels_BS.reshape(-1)[at] == batch.tokens[index[at]]
            seen += index[micro.loss_mask_BS.numpy().reshape(-1) > 0].tolist()
    assert sorted(seen) == np.flatnonzero(batch.chosen).tolist()
    if budget >= batch.lengths.sum():
        once = sum((size - 1) * (answers - 1) for size, answers in prompts)
        assert places == batch.lengths.sum() - len(batch) - once


def test_a_rank_without_trajectories_still_has_a_micro_batch():
    batch = batch_of([3, 4])
    (micro,) = micro_batches(batch, [], 10)
    assert micro.loss_mask_BS.sum() == 0
    assert micro.fields_BS.keys() == micro_batches(batch, [0], 10)[0].fields_BS.keys()


def test_of_no_valid_trajectory_no_batch_is_made():
    failed = Trajectory([1, 2], [False, True], [0, -1], [-1, 0], None)
    with pytest.raises(ValueError, match="no trajectory"):
        Batch.of([Group(0, (failed,))])

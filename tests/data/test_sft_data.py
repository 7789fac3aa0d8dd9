"""Examples as samples: every epoch has each once, in an order that (seed, epoch) fix, whatever they are packed with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.config import SFTDataConfig
from raytron.data import GlobalBatches, build_sft_datasets, prepare_examples
from raytron.data.packing import first_fit, lay

PAIRS = [("q" * (1 + i % 7), "a" * (1 + i % 5)) for i in range(23)]


def write(path: Path, pairs=PAIRS) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
    return path


@pytest.fixture
def config(tmp_path) -> SFTDataConfig:
    return SFTDataConfig(
        path=str(write(tmp_path / "pairs.jsonl")), sequence_length=24, cache_path=str(tmp_path / "cache")
    )


def datasets(config: SFTDataConfig, batch: int = 4, **much):
    prepared = prepare_examples(config, config.tokenizer or "byte")
    return build_sft_datasets(config, prepared, batch, **(much or {"epochs": 1}))


def said(dataset, index: int) -> list[tuple[list[int], list[int]]]:
    """The examples in a sample, read off its tokens and labels: (all but the last token, the labels with a loss)."""
    sample, found = dataset[index], []
    for document in range(sample.document_ids_S.max() + 1):
        here = sample.document_ids_S == document
        found.append((sample.tokens_S[here].tolist(), sample.labels_S[here & (sample.loss_mask_S > 0)].tolist()))
        assert sample.position_ids_S[here].tolist() == list(range(here.sum()))
    return found


def expected(pairs) -> list[tuple[list[int], list[int]]]:
    return [([*p.encode(), *r.encode()], [*r.encode(), 256]) for p, r in pairs]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), max_size=40), st.integers(1, 12), st.one_of(st.none(), st.integers(1, 5)), st.randoms()
)
def test_first_fit_places_everything_once_in_rows_that_hold_it(sizes, budget, window, chance):
    order = chance.sample(range(len(sizes)), len(sizes))
    rows = first_fit(np.array(sizes, int), order, budget, window)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= budget or len(row) == 1 for row in rows)
    assert all(row == sorted(row, key=order.index) for row in rows)


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(0, 3), st.data())
def test_lay_shows_each_token_once_as_input_and_once_as_label(lengths, spare, data):
    starts = np.concatenate(([0], np.cumsum(lengths)))
    tokens = np.arange(100, 100 + starts[-1])
    rows = data.draw(st.permutations(range(len(lengths))).map(lambda order: [order[::2], order[1::2]]))
    width = max(sum(lengths[i] - 1 for i in row) for row in rows) + spare + 1
    laid = lay(tokens, starts, np.array(lengths), rows, width, {"number": tokens * 2.0})
    real = laid.documents_RW >= 0
    assert (laid.labels_RW[real] == laid.tokens_RW[real] + 1).all()
    assert (tokens[laid.index_RW[real]] == laid.labels_RW[real]).all()
    assert (laid.columns["number"][real] == 2.0 * laid.labels_RW[real]).all()
    firsts = {int(starts[i]) + 100 for i in range(len(lengths))}
    assert sorted(laid.labels_RW[real]) == [t for t in tokens if t not in firsts]
    assert not laid.columns["number"][~real].any()


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_has_every_example_once_and_is_a_whole_number_of_batches(config, packing):
    config = replace(config, packing=packing)
    train, _ = datasets(config, batch=5, epochs=3)
    assert len(train) % 5 == 0
    whole = expected(PAIRS)
    at = 0
    orders = []
    for _ in range(3):
        found, order = [], []
        while len(found) < len(whole):
            found += said(train, at)
            order += train.members(at).tolist()
            at += 1
        at += -at % 5
        assert sorted(found) == sorted(whole)
        assert [whole[i] for i in order] == found
        orders.append(order)
    assert at == len(train)
    assert len({tuple(order) for order in orders}) == 3, "each epoch has an order of its own"
    assert packing == (len(train) < 3 * len(PAIRS))


def test_samples_depend_on_neither_how_many_there_are_nor_who_asks(config):
    whole, _ = datasets(config, epochs=4)
    for much in ({"epochs": 4}, {"epochs": 2}, {"samples": 7}):
        part, _ = datasets(config, **much)
        assert len(part) >= much.get("samples", 1)
        for i in reversed(range(len(part))):
            assert all(np.array_equal(a, b) for a, b in zip(part[i], whole[i], strict=True))
    other, _ = datasets(replace(config, seed=9), epochs=1)
    assert other.order(0).tolist() != whole.order(0).tolist()
    with pytest.raises(IndexError, match="build the dataset with more samples"):
        other[len(other)]


def test_a_loader_goes_on_where_it_was_and_leaves_out_columns_without_a_loss(config):
    train, _ = datasets(replace(config, packing=False), epochs=2)
    whole = GlobalBatches(train, 4, 2, 24)
    short = GlobalBatches(train, 4, 2, 24, trim=2)
    with short.prefetch(0) as straight:
        steps = list(straight)
    with short.prefetch(8) as rest:
        for mine, theirs in zip(rest, steps[2:], strict=True):
            assert all((a.tokens_BS == b.tokens_BS).all() for a, b in zip(mine, theirs, strict=True))
    widths = set()
    for consumed, step in zip(range(0, len(train), 4), steps, strict=True):
        for mine, theirs in zip(step, whole.read(consumed), strict=True):
            width = mine.tokens_BS.shape[1]
            widths.add(width)
            assert (mine.labels_BS == theirs.labels_BS[:, :width]).all()
            assert mine.loss_mask_BS.sum() == theirs.loss_mask_BS.sum()
    assert max(widths) < 24
    assert all(width % 2 == 0 for width in widths)


def test_examples_longer_than_a_row_are_refused_cut_or_left_out_and_counted(config, tmp_path):
    long = [("qq", "a" * 30), ("q" * 40, "a"), ("q", "a")]
    config = replace(config, path=str(write(tmp_path / "long.jsonl", long)))
    with pytest.raises(ValueError) as caught:
        datasets(config)
    for words in ("long.jsonl:1 has 33 tokens", "2 of 3 examples are longer", "the longest has 42", "data.overlong"):
        assert words in str(caught.value)
    cut, _ = datasets(replace(config, overlong="truncate"))
    assert (cut.fit.truncated, cut.fit.dropped) == (1, 1), "one has no answer left"
    assert "1 cut and 1 left out" in str(cut.fit)
    found = [example for i in range(len(cut)) for example in said(cut, i)]
    assert sorted(map(len, (labels for _, labels in found))) == [2, 23]
    left, _ = datasets(replace(config, overlong="drop"))
    assert (left.fit.truncated, left.fit.dropped) == (0, 2)
    assert said(left, 0) == expected(long[2:])
    with pytest.raises(ValueError, match="none of the 1 examples fits"):
        datasets(replace(config, path=str(write(tmp_path / "none.jsonl", long[1:2])), overlong="truncate"))


def test_held_out_examples_come_in_their_order_and_are_not_trained_on(config, tmp_path):
    train, held_out = datasets(replace(config, held_out=6, packing=False), batch=4)
    assert [said(held_out, i)[0] for i in range(6)] == expected(PAIRS[:6])
    assert len(held_out) == 8
    assert sorted(example for i in range(17) for example in said(train, i)) == sorted(expected(PAIRS[6:]))
    apart = replace(config, evaluation_path=str(write(tmp_path / "other.jsonl", PAIRS[:3])), packing=False)
    train, held_out = datasets(apart)
    assert [said(held_out, i)[0] for i in range(3)] == expected(PAIRS[:3])
    with pytest.raises(ValueError, match=r"has 23 examples, of which data.held_out takes 23"):
        datasets(replace(config, held_out=23))
    with pytest.raises(ValueError, match="exclude each other"):
        replace(apart, held_out=1)


def test_what_is_tokenized_is_kept_and_a_changed_file_is_not_taken_for_it(config, tmp_path):
    first = prepare_examples(config, "byte")
    assert prepare_examples(config, "byte") == first
    assert (first.examples, first.tokens) == (23, sum(len(p) + len(r) + 1 for p, r in PAIRS))
    assert first.answer_tokens == sum(len(r) + 1 for _, r in PAIRS)
    write(tmp_path / "pairs.jsonl", PAIRS[1:])
    second = prepare_examples(config, "byte")
    assert (second.train != first.train, second.examples) == (True, 22)
    (tmp_path / "pairs.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"pairs.jsonl is empty"):
        prepare_examples(config, "byte")
    with pytest.raises(ValueError, match=r"data.path is not set"):
        prepare_examples(replace(config, path=None), "byte")

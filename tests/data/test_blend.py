"""Blends: the golden numbers, the rule itself as an oracle, and shares kept at every prefix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.data import BlendedDataset, GPTDataset
from raytron.data.blend import blend_sizes, build_blending_indices, build_exhaustive_blending_indices, normalize

WEIGHTS = st.lists(st.floats(0.01, 10), min_size=1, max_size=6)


def test_golden_blend(golden) -> None:
    expected = golden["blend"]
    datasets, samples = build_blending_indices(expected["weights"], len(expected["dataset_index"]))
    assert datasets.tolist() == expected["dataset_index"]
    assert samples.tolist() == expected["dataset_sample_index"]
    assert (datasets.dtype, samples.dtype) == (np.int16, np.int64)


@settings(deadline=None, max_examples=50)
@given(WEIGHTS, st.integers(0, 200))
def test_greedy_rule(weights, size) -> None:
    shares = normalize(weights)
    datasets, samples = build_blending_indices(shares, size)
    drawn = np.zeros(len(shares))
    for i in range(size):
        assert datasets[i] == np.argmax(np.array(shares) * max(i, 1) - drawn)
        assert samples[i] == drawn[datasets[i]]
        drawn[datasets[i]] += 1
        assert (np.abs(np.array(shares) * (i + 1) - drawn) < len(shares)).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_exhaustive_blend_uses_every_sample_once(sizes) -> None:
    datasets, samples = build_exhaustive_blending_indices(sizes)
    expected = {(k, j) for k, size in enumerate(sizes) for j in range(size)}
    assert set(zip(datasets.tolist(), samples.tolist(), strict=True)) == expected
    assert len(datasets) == len(expected)


def test_sizes_are_megatrons() -> None:
    assert blend_sizes([0.5, 0.3, 0.2], 1001) == [501, 301, 201]
    assert blend_sizes([0.5, 0.3, 0.2], 1001, 0.005) == [504, 303, 203]


@settings(deadline=None, max_examples=50)
@given(WEIGHTS, st.integers(1, 500))
def test_surplus_covers_what_is_drawn(weights, num_samples) -> None:
    shares = normalize(weights)
    datasets, _ = build_blending_indices(normalize(shares), sum(blend_sizes(shares, num_samples)))
    drawn = np.bincount(datasets, minlength=len(shares))
    assert (drawn <= np.array(blend_sizes(shares, num_samples, 0.005)) + 1).all()


@pytest.fixture
def three(make_indexed):
    def build(samples: list[int | None], **options) -> list[GPTDataset]:
        return [
            GPTDataset(
                make_indexed([[10 * k + 1] * 30, [10 * k + 2] * 30], name=f"c{k}"),
                range(2),
                n,
                sequence_length=4,
                seed=1,
                eod=0,
                **options,
            )
            for k, n in enumerate(samples)
        ]

    return build


def test_blended_dataset(three, tmp_path, golden) -> None:
    parts = three([11, 7, 5], document_mask=True)
    blend = BlendedDataset(parts, [5, 3, 2], 20, tmp_path / "indices")
    assert len(blend) == 20
    assert (blend.sequence_length, blend.document_mask, blend.restart_positions) == (4, True, True)
    for i in range(20):
        k, j = golden["blend"]["dataset_index"][i], golden["blend"]["dataset_sample_index"][i]
        assert blend[i].tokens_S.tolist() == parts[k][j].tokens_S.tolist()
    again = BlendedDataset(parts, [5, 3, 2], 20, tmp_path / "indices")
    assert isinstance(again.dataset_index, np.memmap)
    assert again[13].tokens_S.tolist() == blend[13].tokens_S.tolist()
    with pytest.raises(IndexError):
        blend[20]


def test_counts_follow_the_weights(three) -> None:
    counts = BlendedDataset(three([50, 10, 10]), [0.8, 0.1, 0.1], 60).token_counts()
    assert counts[[1, 2]].sum() / counts.sum() == pytest.approx(0.8)


def test_exhaustive_dataset(three) -> None:
    parts = three([None, None])
    assert len(BlendedDataset(parts, None)) == sum(map(len, parts))


def test_bad_blends(three) -> None:
    parts = three([5, 5])
    with pytest.raises(IndexError, match="larger surplus"):
        BlendedDataset(parts, [1, 1], 500)
    with pytest.raises(ValueError, match="positive numbers"):
        BlendedDataset(parts, [1, -1], 5)
    with pytest.raises(ValueError, match="need a number of samples"):
        BlendedDataset(parts, [1, 1])

"""GPT indices: the golden numbers, a literal walk over the documents as Megatron's C++ does it, their properties."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytron.data import GPTDataset, MockDocuments
from raytron.data.gpt import build_indices

LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) >= 2)


def walk(sizes, document_index, sequence_length: int, count: int) -> list[list[int]]:
    """Where each sample starts, document by document: the reference that `build_indices` computes at once."""
    rows, place, offset = [[0, 0]], 0, 0
    while len(rows) <= count:
        remaining = sequence_length + 1
        while remaining > 0:
            held = int(sizes[document_index[place]]) - offset
            remaining -= held
            if remaining <= 0:
                offset += remaining + held - 1
            elif place == len(document_index) - 1:
                offset = int(sizes[document_index[place]]) - 1
                break
            else:
                place, offset = place + 1, 0
        rows.append([place, offset])
    return rows


def dataset_of(source, documents: range, num_samples: int | None, **options) -> GPTDataset:
    return GPTDataset(source, documents, num_samples, **{"sequence_length": 4, "seed": 1, "eod": 0, **options})


@pytest.mark.parametrize("case", range(4))
def test_golden_indices(golden, case: int) -> None:
    sizes, expected = np.array(golden["sizes"], np.int32), golden["cases"][case]
    documents = np.arange(len(sizes), dtype=np.int32)
    built = build_indices(sizes, documents, expected["num_samples"], expected["seq"], expected["seed"])
    assert built.document.tolist() == expected["document_index"]
    assert built.sample.tolist() == expected["sample_index"]
    assert built.shuffle.tolist() == expected["shuffle_index"]
    assert len(built.document) == expected["epochs"] * len(sizes)
    assert [array.dtype for array in built] == [np.int32, np.int32, np.uint32]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.none() | st.integers(1, 30), st.booleans(), st.integers(0, 99))
def test_sample_index_is_the_walk(lengths, sequence_length, num_samples, drop_last, seed) -> None:
    sizes = np.array(lengths, np.int32)
    built = build_indices(
        sizes,
        np.arange(len(sizes), dtype=np.int32),
        num_samples,
        sequence_length,
        seed,
        drop_last_partial=drop_last,
    )
    assert built.sample.tolist() == walk(sizes, built.document, sequence_length, len(built.sample) - 1)
    assert sorted(built.shuffle.tolist()) == list(range(len(built.sample) - 1))
    assert num_samples is None or len(built.shuffle) >= num_samples
    occurrences = np.bincount(built.document, minlength=len(sizes))
    assert (occurrences == occurrences[0]).all()


def test_last_epoch_is_kept_apart_where_little_of_it_is_used(golden) -> None:
    sizes = np.array(golden["sizes"], np.int32)
    built = build_indices(sizes, np.arange(20, dtype=np.int32), 90, 8, 7)
    assert sorted(built.document[-20:].tolist()) == list(range(20))
    first = (2 * int(sizes.sum()) - 1) // 8
    assert sorted(built.shuffle[:first].tolist()) == list(range(first))


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LENGTHS, st.integers(1, 7), st.integers(0, 99))
def test_every_token_is_predicted_once_per_epoch(make_indexed, lengths, sequence_length, seed) -> None:
    ids = iter(range(1, 1000))
    source = make_indexed([[next(ids) for _ in range(length)] for length in lengths])
    if sum(lengths) <= sequence_length:
        return
    documents = range(len(source))
    dataset = GPTDataset(source, documents, None, sequence_length=sequence_length, seed=seed, eod=0)
    stream = np.concatenate([source[i] for i in dataset.indices.document]).astype(np.int64)
    samples = sorted((dataset[i] for i in range(len(dataset))), key=lambda s: stream.tolist().index(s.tokens_S[0]))
    assert len(samples) == (len(stream) - 1) // sequence_length
    used = len(samples) * sequence_length
    assert np.concatenate([s.tokens_S for s in samples]).tolist() == stream[:used].tolist()
    assert np.concatenate([s.labels_S for s in samples]).tolist() == stream[1 : used + 1].tolist()
    for before, after in pairwise(samples):
        assert before.labels_S[-1] == after.tokens_S[0]  # neighbours share one token
    assert all(s.loss_mask_S.all() for s in samples)
    assert dataset.token_counts().sum() == sum(lengths)


def test_types(make_indexed) -> None:
    sample = dataset_of(make_indexed([[1, 2, 3, 0], [4, 5, 6, 0]]), range(2), None)[0]
    assert [array.dtype for array in sample] == [np.int64, np.int64, np.float32, np.int64, np.int32]
    assert all(array.shape == (4,) and array.flags.writeable for array in sample)


@pytest.mark.parametrize("pad", [None, 0, 9])
def test_padding_carries_no_loss_and_real_ends_do(make_indexed, pad) -> None:
    """Six tokens, four per sample, the partial one kept: the second sample has one label and three of padding."""
    source = make_indexed([[1, 2, 3, 4, 5, 0]])
    dataset = dataset_of(source, range(1), None, pad=pad, drop_last_partial=False)
    samples = sorted((dataset[i] for i in range(len(dataset))), key=lambda s: s.loss_mask_S.sum())
    assert len(samples) == 2
    assert samples[0].tokens_S.tolist() == [5, 0, 0, 0]
    assert samples[0].labels_S.tolist() == [0, 0, 0, 0]
    assert samples[0].loss_mask_S.tolist() == [1, 0, 0, 0]
    assert samples[1].loss_mask_S.tolist() == [1, 1, 1, 1]


def test_documents_positions_and_masks(make_indexed) -> None:
    """One sample over three documents, the middle one holding an end of document of its own."""
    source = make_indexed([[1, 0], [2, 0, 3], [4, 5, 6, 7, 0]])
    options = {"sequence_length": 8, "reset_position_ids": True, "eod_mask_loss": True}
    dataset = dataset_of(source, range(3), 1, **options)
    order = dataset.indices.document.tolist()
    sample = dataset[0]
    starts = [0]
    for document in order:  # documents begin where sequences do and after an end of document
        starts += [starts[-1] + n for n in ({0: (2,), 1: (2, 3), 2: (5,)}[document])]
    ids = [sum(1 for start in sorted(set(starts)) if start <= j) - 1 for j in range(8)]
    assert sample.document_ids_S.tolist() == ids
    assert sample.position_ids_S.tolist() == [j - max(s for s in starts if s <= j) for j in range(8)]
    assert sample.loss_mask_S.tolist() == (sample.tokens_S != 0).astype(float).tolist()
    plain = dataset_of(source, range(3), 1, sequence_length=8)[0]
    assert plain.position_ids_S.tolist() == list(range(8))
    assert plain.loss_mask_S.all()
    assert dataset_of(source, range(3), 1, sequence_length=8, document_mask=True)[0].position_ids_S.tolist() == (
        sample.position_ids_S.tolist()
    )


def test_only_the_documents_of_the_split(make_indexed) -> None:
    source = make_indexed([[n] * 5 for n in range(1, 9)])
    seen = {token for i in range(6) for token in dataset_of(source, range(2, 5), 6)[i].tokens_S.tolist()}
    assert seen == {3, 4, 5}


def test_index_cache(make_indexed, tmp_path, monkeypatch) -> None:
    source = make_indexed([[n] * 5 for n in range(1, 9)])
    cache = tmp_path / "indices"

    def build(seed: int = 1, **options) -> GPTDataset:
        return dataset_of(source, range(8), 20, seed=seed, cache_path=cache, **options)

    with ThreadPoolExecutor(8) as ranks:  # all miss the cache and write it
        datasets = list(ranks.map(lambda _: build(), range(8)))
    files = sorted(path.name for path in cache.iterdir())
    assert [name.split("-", 1)[1] for name in files] == [
        "GPTDataset-train-description.txt",
        "GPTDataset-train-document_index.npy",
        "GPTDataset-train-sample_index.npy",
        "GPTDataset-train-shuffle_index.npy",
    ]
    plain = dataset_of(source, range(8), 20)
    for dataset in datasets:
        assert all((a == b).all() for a, b in zip(dataset.indices, plain.indices, strict=True))
    monkeypatch.setattr("raytron.data.gpt.build_indices", None)  # from here on only the cache can answer
    assert build(eod_mask_loss=True)[3].tokens_S.tolist() == plain[3].tokens_S.tolist()
    with pytest.raises(TypeError):
        build(seed=2)


def test_cache_notices_another_corpus_of_the_same_name(make_indexed, tmp_path) -> None:
    for documents in ([[1] * 5, [2] * 9], [[1] * 9, [2] * 5]):
        dataset = dataset_of(make_indexed(documents), range(2), None, cache_path=tmp_path / "indices")
        stream = np.concatenate([dataset.source.get(i) for i in dataset.indices.document])
        tokens = np.concatenate([dataset[i].tokens_S for i in np.argsort(dataset.indices.shuffle)])
        assert tokens.tolist() == stream[: len(tokens)].tolist()


def test_too_little_text(make_indexed) -> None:
    source = make_indexed([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"train split of .*corpus holds 3 tokens, fewer than one sample"):
        dataset_of(source, range(1), None)
    assert len(dataset_of(source, range(1), 5)) >= 5  # by repeating it
    with pytest.raises(IndexError, match="build it with more samples"):
        dataset_of(source, range(1), 5)[99]


def test_mock_documents() -> None:
    mock = MockDocuments(vocab_size=50, eod=49)
    assert (len(mock), mock.sequence_lengths.dtype) == (100_000, np.int32)
    lengths = np.random.default_rng(0).integers(1, 4096, size=100_000, dtype=np.int32)
    assert (mock.sequence_lengths == lengths).all()
    for index in range(5):
        whole = np.concatenate([(np.arange(lengths[index] - 1) + 1) % 50, [49]])
        assert mock.get(index).tolist() == whole.tolist()
        assert mock.get(index, 7, 60).tolist() == whole[7:67].tolist()
        assert mock.get(index, 7).tolist() == whole[7:].tolist()
    assert mock.get(0, 3, 0).tolist() == []

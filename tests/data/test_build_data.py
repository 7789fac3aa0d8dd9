"""From a DataConfig to datasets: what is made once, what is kept, and what is refused before a rank starts."""

import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import raytron.data
from raytron.config import DataConfig
from raytron.data import (
    BlendedDataset,
    GlobalBatches,
    GPTDataset,
    IndexedDatasetWriter,
    build_datasets,
    load_tokenizer,
    prepare,
    unigram_entropy,
)
from raytron.data.build import split_ranges


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"the cat {i} sat on mat {i * i}"}) + "\n" for i in range(200)))
    return path


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_prepare_once_then_build_anywhere(corpus, tmp_path, tokenizer) -> None:
    config = DataConfig(path=str(corpus), tokenizer=tokenizer, sequence_length=16, split="90,10,0")
    prepared = prepare(config, tmp_path / "cache", progress=False)
    assert prepared.documents == 200
    assert prepared.max_token_id < prepared.vocab_size
    assert prepared.tokenizer().decode(prepared.tokenizer().encode("the cat")) == "the cat"
    first = build_datasets(config, prepared, 300, 20)
    kept = files(tmp_path / "cache")
    again = prepare(config, tmp_path / "cache", progress=False)
    assert again == prepared == pickle.loads(pickle.dumps(prepared))
    second = build_datasets(config, again, 300, 20)
    assert files(tmp_path / "cache") == kept
    assert first[2] is None
    for one, two, samples in zip(first[:2], second[:2], (300, 20), strict=True):
        assert isinstance(one, GPTDataset)
        assert isinstance(two, GPTDataset)
        assert len(one) >= samples
        assert one[7].tokens_S.tolist() == two[7].tokens_S.tolist()
    assert first[0].documents == range(180)
    assert first[1].documents == range(180, 200)
    assert len(GlobalBatches(first[0], 8, 2, 16).read(0, 1, 2)) == 2


def test_cache_follows_content_and_settings(corpus, tmp_path) -> None:
    config = DataConfig(path=str(corpus))
    one = prepare(config, tmp_path / "cache", progress=False)
    moved = corpus.rename(tmp_path / "elsewhere.jsonl").rename(corpus)
    assert prepare(config, tmp_path / "cache", progress=False).sources == one.sources
    moved.write_text(moved.read_text().replace("cat", "dog"))
    two = prepare(config, tmp_path / "cache", progress=False)
    three = prepare(DataConfig(path=str(corpus), tokenizer="bpe:260"), tmp_path / "cache", progress=False)
    assert len({one.sources, two.sources, three.sources}) == 3


def test_ranks_may_all_prepare(corpus, tmp_path) -> None:
    config = DataConfig(path=str(corpus), tokenizer="bpe:260")
    with ThreadPoolExecutor(4) as ranks:
        prepared = list(ranks.map(lambda _: prepare(config, tmp_path / "cache", progress=False), range(4)))
    assert len(set(prepared)) == 1
    assert [path.suffix for path in (tmp_path / "cache").glob("text-*")].count(".bin") == 1


def test_damaged_cache(corpus, tmp_path) -> None:
    config = DataConfig(path=str(corpus))
    prepared = prepare(config, tmp_path / "cache", progress=False)
    pair = Path(prepared.sources[0] + ".bin")
    pair.write_bytes(pair.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"\.bin is truncated"):
        prepare(config, tmp_path / "cache", progress=False)
    pair.unlink()
    assert prepare(config, tmp_path / "cache", progress=False) == prepared


def test_one_text_file_can_be_split(tmp_path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"Line {i} of a long book.\n" for i in range(60_000)))
    config = DataConfig(path=str(tmp_path / "book.txt"), sequence_length=64, cache_path=str(tmp_path / "cache"))
    prepared = prepare(config, tmp_path / "ignored", progress=False)
    train, valid, _ = build_datasets(config, prepared, None, None)
    assert len(train) > 50 * len(valid) > 0
    assert not (tmp_path / "ignored").exists()


def test_tokenized_data_and_its_vocabulary(corpus, tmp_path) -> None:
    raytron.data.preprocess(corpus, tmp_path / "mine", load_tokenizer("byte"), progress=False)
    for name in ("mine", "mine.bin", "mine.idx"):
        prepared = prepare(DataConfig(path=str(tmp_path / name)), tmp_path / "cache", progress=False)
        assert (prepared.max_token_id, prepared.documents) == (256, 200)
        assert prepared.sources == (str(tmp_path / "mine"),)
    with pytest.raises(ValueError, match=r"mine\.bin holds token id 256, outside the vocabulary of 101 .*'null:100'"):
        prepare(DataConfig(path=str(tmp_path / "mine"), tokenizer="null:100"), tmp_path / "cache", progress=False)
    with pytest.raises(ValueError, match="trained on raw text, and there is none"):
        prepare(DataConfig(path=str(tmp_path / "mine"), tokenizer="bpe:300"), tmp_path / "cache", progress=False)


def test_blend(corpus, tmp_path) -> None:
    (tmp_path / "other.txt").write_text("".join(f"ANOTHER TEXT {i}\n" for i in range(4000)))
    blend = ((3.0, str(corpus)), (1.0, str(tmp_path / "other.txt")))
    config = DataConfig(blend=blend, tokenizer="bpe:300", sequence_length=8, split="80,20,0")
    prepared = prepare(config, tmp_path / "cache", progress=False)
    train, valid, _ = build_datasets(config, prepared, 400, None)
    assert isinstance(train, BlendedDataset)
    assert len(train) == 400
    assert np.bincount(train.dataset_index).tolist() == [300, 100]
    assert isinstance(valid, BlendedDataset)
    assert len(valid) == sum(map(len, valid.datasets))
    assert GlobalBatches(train, 400, 4, 8).read(0)[-1].tokens_BS.shape == (4, 8)


def test_mock(tmp_path) -> None:
    config = DataConfig(mock=True, tokenizer="null:1000", sequence_length=512)
    prepared = prepare(config, tmp_path / "cache", progress=False)
    assert (prepared.sources, prepared.vocab_size, prepared.max_token_id) == ((), 1001, 1000)
    train, valid, test = build_datasets(config, prepared, 100, 10, 10)
    assert [d.documents for d in (train, valid, test)] == [
        range(33333),
        range(33333, 66667),
        range(66667, 100_000),
    ]
    assert train[0].labels_S.max() <= 1000


def test_unigram_entropy(tmp_path) -> None:
    with IndexedDatasetWriter(tmp_path / "even", np.uint16) as writer:
        for _ in range(10):
            writer.add_document([0, 1, 2, 3])
    config = DataConfig(path=str(tmp_path / "even"), tokenizer="null:3", sequence_length=4)
    train, _, _ = build_datasets(config, prepare(config, tmp_path / "cache"), None)
    assert unigram_entropy(train) == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("99,1,0", [range(99), range(99, 100), range(100, 100)]),
        ("1,1,1", [range(33), range(33, 67), range(67, 100)]),
        ("969, 30, 1", [range(97), range(97, 100), range(100, 100)]),
        ("1", [range(100), range(100, 100), range(100, 100)]),
    ],
)
def test_split_ranges(split, expected) -> None:
    assert list(split_ranges(split, 100)) == expected


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,-1,1", "1,1,1,1", "nan,1,0"])
def test_bad_split(split) -> None:
    with pytest.raises(ValueError, match=r"data\.split is .*such as '99,1,0'"):
        split_ranges(split, 100)


def test_refusals_name_the_field(corpus, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"data\.path is not set"):
        prepare(DataConfig(), tmp_path)
    with pytest.raises(ValueError, match=r"data\.cache_path is not set"):
        prepare(DataConfig(mock=True))
    with pytest.raises(ValueError, match="isn't there"):
        prepare(DataConfig(path=str(tmp_path / "nowhere")), tmp_path / "cache")
    with pytest.raises(ValueError, match="isn't there: say 'byte'"):
        prepare(DataConfig(path=str(corpus), tokenizer="bytes"), tmp_path / "cache")
    with pytest.raises(ValueError, match="trained on raw text, and there is none"):
        prepare(DataConfig(mock=True, tokenizer="bpe:300"), tmp_path / "cache")
    with IndexedDatasetWriter(tmp_path / "none", np.uint16):
        pass
    with pytest.raises(ValueError, match=r"none\.bin: the corpus is empty"):
        prepare(DataConfig(path=str(tmp_path / "none")), tmp_path / "cache")
    config = DataConfig(path=str(corpus), split="100,0,0")
    prepared = prepare(config, tmp_path / "cache", progress=False)
    with pytest.raises(
        ValueError, match=rf"the valid split of {corpus} is empty: data\.split '100,0,0' of its 200 documents"
    ):
        build_datasets(config, prepared, 10, 10)


def test_public_names_are_there() -> None:
    assert all(hasattr(raytron.data, name) for name in raytron.data.__all__)
    assert sorted(raytron.data.__all__) == raytron.data.__all__
    with pytest.raises(AttributeError):
        raytron.data.nothing  # noqa: B018
    assert callable(raytron.data.preprocess)


def test_workers_need_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, raytron.data; print(*(m for m in ('torch', 'transformers', 'pyarrow', 'ray') if m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"

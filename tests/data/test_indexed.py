"""The .bin/.idx pair against a literal construction of the format's table, and what damaged pairs say."""

import pickle
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytron.data import IndexedDataset, IndexedDatasetWriter
from raytron.data.indexed import dataset_prefix, token_dtype

DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 60000), max_size=6), max_size=3), max_size=8)


def literal_pair(documents: list[list[list[int]]], code: int, token: str) -> tuple[bytes, bytes]:
    """Both files of `documents` (each a list of sequences), field by field as the format's table has them."""
    sequences = [sequence for document in documents for sequence in document]
    boundaries = [0]
    for document in documents:
        boundaries.append(boundaries[-1] + len(document))
    idx = bytes.fromhex("4d4d49444944580000") + struct.pack("<QBQQ", 1, code, len(sequences), len(boundaries))
    pointer = 0
    pointers = []
    for sequence in sequences:
        pointers.append(pointer)
        pointer += len(sequence) * struct.calcsize(token)
    idx += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    idx += b"".join(struct.pack("<q", pointer) for pointer in pointers)
    idx += b"".join(struct.pack("<q", boundary) for boundary in boundaries)
    return b"".join(struct.pack(token, t) for s in sequences for t in s), idx


def write(prefix, documents, dtype) -> None:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            for sequence in document:
                writer.add_item(sequence)
            writer.end_document()


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=DOCUMENTS, kind=st.sampled_from([(8, "<H", np.uint16), (4, "<i", np.int32), (5, "<q", np.int64)]))
def test_bytes_are_the_formats(documents, kind, tmp_path) -> None:
    code, token, dtype = kind
    prefix = tmp_path / "pair"
    write(prefix, documents, dtype)
    tokens, index = literal_pair(documents, code, token)
    assert prefix.with_suffix(".bin").read_bytes() == tokens
    assert prefix.with_suffix(".idx").read_bytes() == index
    read = IndexedDataset(prefix)
    assert read.dtype == dtype
    assert [read[i].tolist() for i in range(len(read))] == [s for document in documents for s in document]
    assert read.tokens.tolist() == [t for document in documents for s in document for t in s]


def test_golden_head(tmp_path) -> None:
    with IndexedDatasetWriter(tmp_path / "golden", np.uint16) as writer:
        for length in range(1, 21):
            writer.add_document(list(range(length)))
    index = (tmp_path / "golden.idx").read_bytes()
    head = "4d4d494449445800000100000000000000 08 1400000000000000 1500000000000000"
    assert index[:34] == bytes.fromhex(head)
    assert len(index) == 442
    assert index[34 + 4 * 20 :][:8] == bytes(8)  # int64 that begins 2 bytes past a multiple of 8


def test_multimodal_modes_are_skipped(make_indexed) -> None:
    dataset = make_indexed([[1, 2], [3]])
    with open(dataset.prefix + ".idx", "ab") as file:
        file.write(bytes(2))
    assert IndexedDataset(dataset.prefix)[1].tolist() == [3]


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(DOCUMENTS, min_size=1, max_size=3))
def test_merge_is_concatenation(parts, tmp_path) -> None:
    for number, part in enumerate(parts):
        write(tmp_path / f"part{number}", part, np.uint16)
    with IndexedDatasetWriter(tmp_path / "merged", np.uint16) as writer:
        for number in range(len(parts)):
            writer.merge(tmp_path / f"part{number}")
    write(tmp_path / "whole", [document for part in parts for document in part], np.uint16)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_add_document_cuts_into_sequences(tmp_path) -> None:
    with IndexedDatasetWriter(tmp_path / "pair", np.uint16) as writer:
        writer.add_document([1, 2, 3, 4, 5], lengths=[2, 3])
    dataset = IndexedDataset(tmp_path / "pair")
    assert [s.tolist() for s in (dataset[0], dataset[1])] == [[1, 2], [3, 4, 5]]
    assert dataset.document_indices.tolist() == [0, 2]


def test_slices_and_pickling(make_indexed) -> None:
    dataset = pickle.loads(pickle.dumps(make_indexed([[9], [1, 2, 3, 4], []])))
    assert dataset.get(1, 1).tolist() == [2, 3, 4]
    assert dataset.get(1, 1, 2).tolist() == [2, 3]
    assert dataset.get(2).tolist() == []
    assert not dataset.get(1).flags.writeable
    for bad in ((1, 3, 2), (1, 5), (1, -1)):
        with pytest.raises(IndexError):
            dataset.get(*bad)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(257, "uint16"), (65499, "uint16"), (65500, "int32"), (2**17, "int32")]
)
def test_token_dtype(vocabulary: int, dtype: str) -> None:
    assert token_dtype(vocabulary) == dtype


def test_an_error_leaves_the_older_pair_and_nothing_else(tmp_path) -> None:
    write(tmp_path / "pair", [[[1]]], np.uint16)

    def interrupted() -> None:
        with IndexedDatasetWriter(tmp_path / "pair", np.uint16) as writer:
            writer.add_document([2, 3])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pair.bin", "pair.idx"]
    assert IndexedDataset(tmp_path / "pair")[0].tolist() == [1]


def corrupt(path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: corrupt(p / "corpus.idx", 0, b"MMMIDX"), r"corpus\.idx: wrong magic .* make one with"),
        (lambda p: (p / "corpus.idx").write_bytes(b""), r"corpus\.idx: wrong magic"),
        (lambda p: corrupt(p / "corpus.idx", 9, b"\x02"), r"corpus\.idx: version 2"),
        (lambda p: corrupt(p / "corpus.idx", 17, b"\x07"), r"corpus\.idx: dtype code 7"),
        (lambda p: corrupt(p / "corpus.idx", 17, b"\x63"), r"corpus\.idx: dtype code 99"),
        (lambda p: corrupt(p / "corpus.idx", 34 + 12 * 2 + 16, b"\x07"), r"corpus\.idx: documents don't span"),
        (lambda p: (p / "corpus.idx").write_bytes((p / "corpus.idx").read_bytes()[:20]), r"idx is truncated: 20 bytes"),
        (lambda p: (p / "corpus.idx").write_bytes((p / "corpus.idx").read_bytes()[:-1]), r"idx is truncated.*copy it"),
        (lambda p: (p / "corpus.idx").write_bytes((p / "corpus.idx").read_bytes() + bytes(9)), r"header promises"),
        (lambda p: (p / "corpus.bin").write_bytes((p / "corpus.bin").read_bytes()[:-1]), r"bin is truncated: 9 bytes"),
        (lambda p: (p / "corpus.bin").write_bytes(b""), r"corpus\.bin is truncated: 0 bytes of 10"),
        (lambda p: (p / "corpus.bin").unlink(), r"corpus\.bin is missing: .* copy both"),
        (lambda p: (p / "corpus.idx").unlink(), r"corpus\.idx is missing"),
    ],
)
def test_damaged_pairs_are_named(damage, says, make_indexed, tmp_path) -> None:
    prefix = make_indexed([[1, 2, 3], [4, 5]]).prefix
    damage(tmp_path)
    with pytest.raises(ValueError, match=says):
        IndexedDataset(prefix)


def test_prefixes(make_indexed, tmp_path) -> None:
    prefix = make_indexed([[1]]).prefix
    (tmp_path / "corpus").mkdir()  # Megatron keeps its index cache in a folder of that very name
    assert dataset_prefix(prefix) == dataset_prefix(prefix + ".bin") == dataset_prefix(prefix + ".idx") == prefix
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.bin").write_bytes(b"unrelated")
    assert dataset_prefix(tmp_path / "folder") is None
    assert dataset_prefix(tmp_path / "nothing") is None


def test_bad_writes(tmp_path, make_indexed) -> None:
    with pytest.raises(ValueError, match="float32 can't hold token ids"):
        IndexedDatasetWriter(tmp_path / "pair", np.float32)
    with pytest.raises(ValueError, match="don't fit uint16"), IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_item([65536])
    with pytest.raises(ValueError, match="add up to 3"), IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([1, 2], lengths=[3])
    other = make_indexed([[1]], dtype=np.int32)
    with pytest.raises(ValueError, match="preprocess both"), IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.merge(other.prefix)
    with pytest.raises(ValueError, match=r"nowhere\.idx is missing"):
        IndexedDataset(tmp_path / "nowhere")

"""Every kind round-trips text, survives pickling and saving, and is the same tokenizer to transformers."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.data import ByteTokenizer, HFTokenizer, NullTokenizer, load_tokenizer, train_bpe
from raytron.data.tokenizer import END_OF_TEXT

BYTE = ByteTokenizer()
TEXTS = [
    "",
    "hello world",
    "naïve 日本語 🙂\n\n\tdef f(x):\r\n  return x  \n",
    " a\u3000b\x00\x7f",
    f"one{END_OF_TEXT}two",
]


@pytest.fixture(scope="module")
def bpe() -> HFTokenizer:
    return train_bpe(["the cat sat on the mat", "the dog sat on the log; naïve 日本語"] * 50, 300)


@settings(deadline=None)
@given(st.text())
def test_bytes_round_trip_any_text(text: str) -> None:
    byte = BYTE
    if END_OF_TEXT not in text:
        assert byte.decode(byte.encode(text)) == text
    assert byte.encode(text) == HFTokenizer.encode(byte, text)


@settings(deadline=None)
@given(st.text())
def test_bpe_round_trips_any_text(bpe: HFTokenizer, text: str) -> None:
    if END_OF_TEXT not in text:
        assert bpe.decode(bpe.encode(text)) == text


def test_bpe_is_a_function_of_its_texts(bpe: HFTokenizer) -> None:
    again = train_bpe(["the cat sat on the mat", "the dog sat on the log; naïve 日本語"] * 50, 300)
    assert again.files == bpe.files
    assert (bpe.eod, bpe.pad) == (0, None)
    assert 257 < bpe.vocab_size <= 300
    assert len(bpe.encode("the cat sat on the mat")) < len("the cat sat on the mat")


def test_byte_ids() -> None:
    byte = ByteTokenizer()
    assert (byte.vocab_size, byte.eod, byte.pad) == (257, 256, None)
    assert byte.encode("aé") == [97, 195, 169]
    assert byte.encode(f"a{END_OF_TEXT}") == [97, 256]
    assert byte.decode([0xFF, 97, 256]) == "�a"


def test_null_ids() -> None:
    null = load_tokenizer("null:1000")
    assert (null.vocab_size, null.eod, null.pad) == (1001, 1000, None)
    assert null.encode("3 14\n999") == [3, 14, 999]
    assert null.decode([3, 14, 999, 1000]) == "3 14 999"
    for text in ("3 x", "-1", "1001"):
        with pytest.raises(ValueError, match=r"integer|outside the vocabulary of 1001"):
            null.encode(text)


@pytest.mark.parametrize("kind", ["byte", "null:50", "bpe"])
def test_saved_directory_is_the_same_tokenizer_everywhere(kind: str, bpe: HFTokenizer, tmp_path) -> None:
    from transformers import AutoTokenizer

    ours = bpe if kind == "bpe" else load_tokenizer(kind)
    texts = ["1 2 49", "7"] if kind == "null:50" else TEXTS
    ours.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    unpickled = pickle.loads(pickle.dumps(ours))
    assert theirs.eos_token_id == ours.eod
    assert len(theirs) == ours.vocab_size
    for other in (loaded, unpickled):
        assert type(other) is type(ours)
        assert (other.vocab_size, other.eod, other.pad) == (ours.vocab_size, ours.eod, ours.pad)
        assert other.encode_batch(texts) == ours.encode_batch(texts) == [ours.encode(text) for text in texts]
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_hugging_face_files_are_kept_as_they_are(bpe: HFTokenizer, tmp_path) -> None:
    bpe.save(tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "tokenizer_config.json").read_text())
    config |= {"chat_template": "{{ messages }}", "eos_token": {"content": "cat", "special": False}, "pad_token": "s"}
    (tmp_path / "hub" / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path / "hub")
    # "cat" may or may not be one entry of so small a vocabulary; special_tokens_map is asked next
    assert loaded.eod in (bpe.eod, bpe.backend.token_to_id("cat"))
    assert loaded.pad == bpe.backend.token_to_id("s")
    loaded.save(tmp_path / "copy")
    for file in (tmp_path / "hub").iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
    assert load_tokenizer(tmp_path / "hub" / "tokenizer.json").eod == loaded.eod


def test_pad_that_is_the_end_of_document_is_no_pad(bpe: HFTokenizer, tmp_path) -> None:
    files = dict(bpe.files)
    config = json.loads(files["tokenizer_config.json"]) | {"pad_token": END_OF_TEXT}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    assert HFTokenizer(files).pad is None


def test_stored_truncation_and_padding_are_ignored(bpe: HFTokenizer) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    loaded = HFTokenizer({**bpe.files, "tokenizer.json": backend.to_str().encode()})
    assert loaded.encode("the dog sat on the log") == bpe.encode("the dog sat on the log")


def test_directory_that_only_transformers_can_read(tmp_path) -> None:
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    )
    loaded = load_tokenizer(tmp_path)
    assert (loaded.encode("aab"), loaded.eod) == ([1, 3], 0)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("bites", "isn't there: say 'byte'"),
        ("null:", "isn't a vocabulary size; write it as 'null:32000'"),
        ("null:0", "positive vocabulary"),
        ("bpe:400", "has to be trained"),
    ],
)
def test_bad_spec(spec: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_tokenizer(spec)


def test_bad_files(bpe: HFTokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(["text"], 256)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json can't be read"):
        load_tokenizer(tmp_path)
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    (tmp_path / "tokenizer.json").write_text(words.to_str())
    with pytest.raises(ValueError, match="no end-of-document token; set `eos_token`"):
        load_tokenizer(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json, nor a tokenizer that transformers can"):
        load_tokenizer(tmp_path / "empty")


def test_null_pickles_as_null() -> None:
    assert isinstance(pickle.loads(pickle.dumps(NullTokenizer(9))), NullTokenizer)

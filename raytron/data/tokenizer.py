"""Tokenizers: byte-level BPE trained here, any Hugging Face one, plain bytes, and Megatron's null tokenizer.

Whatever the kind, `save` writes a Hugging Face directory, so that a checkpoint carries its tokenizer and AutoTokenizer
gives the same ids. A Hugging Face directory is kept as the bytes of its own files: writing it back through
transformers would rebuild some families from their vocabulary and lose what the original file says.

Text is encoded without the special tokens a template would add (no BOS); the end-of-document id is added by
`raytron.data.preprocess`, as Megatron does. A special token spelt out in the text becomes that token, as in
transformers.

The library itself is imported where it is used: what only reads tokens, such as an engine, runs without it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
_KIND = "raytron_tokenizer"  # in tokenizer_config.json: lets `load_tokenizer` give back the byte and null kinds
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


class Tokenizer(Protocol):
    """Text to token ids and back.

    `vocab_size` counts every id that can occur (largest id + 1). `eod` ends a document. `pad` is None where there is no
    id of its own for it: a padding id that doubles as `eod` would mask real ends of documents from the loss.
    """

    vocab_size: int
    eod: int
    pad: int | None

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def save(self, directory: str | os.PathLike[str]) -> None: ...


class HFTokenizer:
    """A Hugging Face fast tokenizer, held as the files of its directory (name -> bytes; `tokenizer.json` at least)."""

    def __init__(self, files: Mapping[str, bytes], origin: str = "tokenizer") -> None:
        import tokenizers

        self.files = dict(files)
        try:
            self.backend = tokenizers.Tokenizer.from_buffer(self.files["tokenizer.json"])
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{origin}: tokenizer.json can't be read ({error}); export it again") from error
        # Truncation and padding stored in some tokenizer.json would silently cut documents.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eod = self._end_of_document(origin)
        pad = self._special("pad_token")
        self.pad = None if pad == self.eod else pad

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> HFTokenizer:
        folder = Path(directory)
        return cls({name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}, str(folder))

    def __reduce__(self) -> tuple[type, tuple[dict[str, bytes]]]:
        return type(self), (self.files,)

    def _special(self, name: str) -> int | None:
        """Id of a special token such as `eos_token`, from the two places Hugging Face directories name it."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            token = json.loads(self.files.get(file, b"{}")).get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if text is not None and (found := self.backend.token_to_id(text)) is not None:
                return found
        return None

    def _end_of_document(self, origin: str) -> int:
        eos = self._special("eos_token")
        for text in (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>"):
            eos = self.backend.token_to_id(text) if eos is None else eos
        if eos is None:
            raise ValueError(
                f"{origin}: no end-of-document token; set `eos_token` in its tokenizer_config.json to a token of the"
                " vocabulary"
            )
        return eos

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return self.backend.decode(list(ids))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the Hugging Face directory that AutoTokenizer loads."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


class ByteTokenizer(HFTokenizer):
    """256 bytes and an end-of-document id, 256: any UTF-8 text round-trips, nothing has to be trained."""

    def __init__(self) -> None:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([END_OF_TEXT])
        super().__init__(_hf_files(backend, kind="byte"))

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ByteTokenizer, ()

    def encode(self, text: str) -> list[int]:
        # The same ids as the backend's, ten times faster; only the special token needs the backend.
        return super().encode(text) if END_OF_TEXT in text else list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that aren't UTF-8 become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class NullTokenizer:
    """Megatron's NullTokenizer: text is integers between spaces, ids are those integers, and `size` itself ends."""

    pad = None

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"tokenizer 'null:{size}' needs a positive vocabulary, such as 'null:32000'")
        self.vocab_size = size + 1
        self.eod = size

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return NullTokenizer, (self.eod,)

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in text.split():
            if not word.isdecimal():
                raise ValueError(f"{word[:40]!r} isn't an integer, which is all the null tokenizer reads")
            if int(word) > self.eod:
                raise ValueError(f"token id {word[:40]} is outside the vocabulary of {self.vocab_size}")
            ids.append(int(word))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(i) for i in ids if i != self.eod)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write a word-level Hugging Face tokenizer with the same ids."""
        import tokenizers
        from tokenizers import models, pre_tokenizers

        words = {str(i): i for i in range(self.eod)}
        backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token=END_OF_TEXT))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens([END_OF_TEXT])
        HFTokenizer(_hf_files(backend, kind=f"null:{self.eod}")).save(directory)


def train_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """Byte-level BPE (GPT-2's splitting) of at most `vocab_size` entries; id 0 is <|endoftext|>.

    A small corpus may run out of pairs first, which gives a smaller vocabulary: read `vocab_size` of the result.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"tokenizer 'bpe:{vocab_size}': 256 bytes and {END_OF_TEXT} need a vocabulary of at least 257")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return HFTokenizer(_hf_files(backend))


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `spec` names: "byte", "null:SIZE", a Hugging Face directory or a tokenizer.json.

    Raises ValueError for anything else. "bpe:SIZE" is trained by `raytron.data.prepare`, which has the text. A name on
    the hub is not looked up: a mistyped path would wait for the network, and every rank would have to reach it.
    """
    name = os.fspath(spec)
    if name == "byte":
        return ByteTokenizer()
    if name.startswith("null:"):
        return NullTokenizer(vocabulary_of(name))
    if name.startswith("bpe:"):
        raise ValueError(f"tokenizer {name!r} has to be trained first: preprocess text with it, or name a saved one")
    path = Path(name)
    if path.is_file():
        return _load_file(path)
    if (path / "tokenizer.json").is_file():
        loaded = HFTokenizer.read(path)
        kind = json.loads(loaded.files.get("tokenizer_config.json", b"{}")).get(_KIND)
        return load_tokenizer(kind) if kind else loaded
    if path.is_dir():
        return _load_through_transformers(path)
    raise ValueError(
        f"tokenizer {name!r} isn't there: say 'byte', 'null:SIZE', 'bpe:SIZE', or name a Hugging Face directory or a"
        " tokenizer.json (a model of the hub: `hf download MODEL --local-dir DIRECTORY` first)"
    )


def vocabulary_of(spec: str) -> int:
    """The number behind the colon of "bpe:SIZE" or "null:SIZE"."""
    kind, _, size = spec.partition(":")
    if not size.isdecimal():
        raise ValueError(f"tokenizer {spec!r}: {size!r} isn't a vocabulary size; write it as '{kind}:32000'")
    return int(size)


def _load_file(path: Path) -> HFTokenizer:
    """A tokenizer.json, with what the files beside it say of special tokens."""
    files = {name: (path.parent / name).read_bytes() for name in _FILES[1:3] if (path.parent / name).is_file()}
    return HFTokenizer({"tokenizer.json": path.read_bytes(), **files}, str(path))


def _load_through_transformers(path: Path) -> HFTokenizer:
    """Directories without a tokenizer.json (SentencePiece, say): transformers converts, and we keep what it saves."""
    from transformers import AutoTokenizer  # seconds to import, and needed for these alone

    try:
        converted = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: there is no tokenizer.json, nor a tokenizer that transformers can convert ({error}); add one"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        converted.save_pretrained(folder)
        if not (Path(folder) / "tokenizer.json").is_file():
            raise ValueError(f"{path}: its tokenizer has no fast form; convert it to a tokenizer.json first")
        return HFTokenizer.read(folder)


def _hf_files(backend: tokenizers.Tokenizer, kind: str | None = None) -> dict[str, bytes]:
    """The files of a Hugging Face directory for a tokenizer made here."""
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    config: dict[str, Any] = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(1e30),  # transformers' own way to say "no limit"
        "clean_up_tokenization_spaces": False,
    }
    if kind:
        config[_KIND] = kind
    return {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "special_tokens_map.json": (json.dumps(special, indent=2) + "\n").encode(),
    }


def byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers (GPT-2) write for each of the 256 bytes."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    substitutes = iter(range(256, 512))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]

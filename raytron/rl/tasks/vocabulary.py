"""The small vocabularies of the built-in tasks: every token is a word, and text is words between spaces."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["BOS", "EOS", "Vocabulary"]

BOS, EOS = "<bos>", "<eos>"


class Vocabulary:
    """<bos> is 0, <eos> is 1, `words` follow in their order."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = (BOS, EOS, *words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            raise ValueError(f"a vocabulary's words must differ; got {' '.join(self.words)}")

    def __len__(self) -> int:
        return len(self.words)

    def ids(self, *words: object) -> tuple[int, ...]:
        """Of words, or of what is written as one (`ids(3, "+", 4)`)."""
        return tuple(self._ids[str(word)] for word in words)

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """The words of ids; one outside the vocabulary (a model's may be larger) is <unknown>."""
        return [self.words[i] if 0 <= i < len(self.words) else "<unknown>" for i in token_ids]

    def decode(self, token_ids: Sequence[int], special: bool = False) -> str:
        """Text of ids; special: with <bos> and <eos>."""
        return " ".join(word for word in self.texts(token_ids) if special or word not in (BOS, EOS))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files of a Hugging Face directory; AutoTokenizer gives the same ids for text between spaces."""
        import tokenizers
        from tokenizers import models, pre_tokenizers

        backend = tokenizers.Tokenizer(models.WordLevel(self._ids, unk_token=EOS))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens([BOS, EOS])
        special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
        config = {**special, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        files = {"tokenizer_config.json": config, "special_tokens_map.json": special}
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(backend.to_str(pretty=True) + "\n")
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")

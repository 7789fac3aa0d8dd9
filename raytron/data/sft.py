"""Examples to fine-tune on, as samples: once tokenized into the cache, then packed or padded into rows by index.

    lines --prepare_examples--> tokens, chosen, starts in the cache --SFTDataset--> sample i, a row of sequence_length

Sample i is a pure function of the examples, the settings and i. Every epoch goes through all examples in an order of
its own, which (seed, epoch) fix; it is cut into rows, and the last global batch of an epoch is filled up with empty
ones, which weigh nothing. So an epoch is a whole number of steps, no example is lost or repeated whatever the batch
size, and the only state of a run is how many samples it has consumed. (Rows that run on from one epoch into the next
would save a part of a batch, and make what a finished run saw depend on whether it is to be continued.)
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import uuid
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raytron.config import SFTDataConfig
from raytron.data.build import alone, fingerprint, keep_tokenizer, tokenizer_key
from raytron.data.examples import Example, ExampleReader, example_files
from raytron.data.gpt import Sample, write_whole
from raytron.data.packing import first_fit, lay
from raytron.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Examples", "PreparedExamples", "SFTDataset", "build_sft_datasets", "prepare_examples"]

OPEN_ROWS = 64  # that packing looks through for room


@dataclass(frozen=True)
class PreparedExamples:
    """What `prepare_examples` made, small enough to send to every rank.

    train, held_out: folders of `Examples`. examples, tokens, answer_tokens: how many there are to train on.
    """

    tokenizer_directory: str
    vocab_size: int
    eod: int
    train: str
    held_out: str | None
    examples: int
    tokens: int
    answer_tokens: int

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_directory)


@dataclass(frozen=True)
class Examples:
    """N examples of T tokens in all, mapped from a folder.

    tokens int32 [T]; chosen bool [T]: the model is to write this token; starts int64 [N + 1]; lines int64 [N, 2]: the
    file (of `files`) and the line that each was read from.
    """

    tokens: np.ndarray
    chosen: np.ndarray
    starts: np.ndarray
    lines: np.ndarray
    files: tuple[str, ...]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Examples:
        """What `prepare_examples` left there."""
        path = Path(folder)
        arrays = (np.load(path / f"{n}.npy", mmap_mode="r") for n in ("tokens", "chosen", "starts", "lines"))
        return cls(*arrays, files=tuple(json.loads((path / "files.json").read_text())))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64 [N]."""
        return np.diff(self.starts)

    def where(self, index: int) -> str:
        """The file and line of an example."""
        file, line = self.lines[index].tolist()
        return f"{self.files[file]}:{line}"


def write_examples(folder: Path, examples: Iterable[tuple[int, Example]]) -> None:
    """Write examples, each with the number of its file; readers see the folder whole or not at all."""
    tokens, chosen, starts, lines = array("i"), bytearray(), array("q", [0]), array("q")
    for file, example in examples:
        tokens.extend(example.tokens)
        chosen.extend(example.chosen)
        starts.append(len(tokens))
        lines.extend((file, example.line))
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}")
    partial.mkdir(parents=True)
    arrays = {
        "tokens": np.frombuffer(tokens, np.int32),
        "chosen": np.frombuffer(chosen, np.bool_),
        "starts": np.frombuffer(starts, np.int64),
        "lines": np.frombuffer(lines, np.int64).reshape(-1, 2),
    }
    for name, values in arrays.items():
        np.save(partial / f"{name}.npy", values)
    if folder.is_dir():
        shutil.rmtree(partial)
    else:
        partial.rename(folder)


def prepare_examples(
    config: SFTDataConfig, tokenizer: str, cache_path: str | os.PathLike[str] | None = None
) -> PreparedExamples:
    """Tokenize the files of `config` once; `config.cache_path` goes before `cache_path`.

    tokenizer: what `load_tokenizer` takes.

    Raises ValueError, naming the field or the file and line and the mend, for files without examples or with bad ones.
    """
    where = config.cache_path or cache_path
    if where is None:
        raise ValueError("data.cache_path is not set; name a folder for tokenized examples")
    if not config.path:
        raise ValueError("data.path is not set; name a JSONL file of prompts and responses, or a folder of them")
    cache, loaded = Path(where).absolute(), load_tokenizer(tokenizer)
    with alone(cache):
        directory = keep_tokenizer(loaded, cache)
        train = _tokenized(config, config.path, loaded, directory, cache)
        held_out = None
        if config.evaluation_path is not None:
            held_out = _tokenized(config, config.evaluation_path, loaded, directory, cache)
        elif config.held_out:
            held_out = train
    examples = Examples.open(train)
    first = _first(config)
    if len(examples) <= first:
        raise ValueError(
            f"{config.path} has {len(examples)} examples, of which data.held_out takes {first}; leave some to train on"
        )
    start = int(examples.starts[first])
    return PreparedExamples(
        tokenizer_directory=str(directory),
        vocab_size=loaded.vocab_size,
        eod=loaded.eod,
        train=str(train),
        held_out=None if held_out is None else str(held_out),
        examples=len(examples) - first,
        tokens=len(examples.tokens) - start,
        answer_tokens=int(examples.chosen[start:].sum()),
    )


def _first(config: SFTDataConfig) -> int:
    """The first example of `path` that is trained on."""
    return 0 if config.evaluation_path is not None else config.held_out


def _tokenized(config: SFTDataConfig, path: str, tokenizer: Tokenizer, directory: Path, cache: Path) -> Path:
    """The folder of a path's examples, tokenized unless it is there."""
    files = example_files(path)
    folder = cache / f"examples-{fingerprint(files, 'examples', config.chat, tokenizer_key(tokenizer))}"
    if not folder.is_dir():
        reader = ExampleReader(tokenizer, str(directory), config.chat)
        numbered = ((number, example) for number, file in enumerate(files) for example in reader.read(file))
        if (first := next(numbered, None)) is None:
            raise ValueError(f"{path} is empty; each line should be an example")
        write_examples(folder, itertools.chain([first], numbered))
    write_whole(folder / "files.json", lambda out: out.write(json.dumps([*map(str, files)]).encode()))
    return folder


@dataclass(frozen=True)
class Fit:
    """How examples fit rows. kept int64 [K]: those that are used; lengths int64 [N]: tokens of each that are used;
    truncated, dropped: how many were cut, and left out; example: one of them."""

    kept: np.ndarray
    lengths: np.ndarray
    truncated: int
    dropped: int
    example: str | None

    def __str__(self) -> str:
        """What to tell the user; empty where everything fits."""
        done = {"cut": self.truncated, "left out": self.dropped}
        counts = " and ".join(f"{count:,} {what}" for what, count in done.items() if count)
        return f"examples longer than data.sequence_length: {counts} (such as {self.example})" if counts else ""


def fit(examples: Examples, part: range, sequence_length: int, overlong: str) -> Fit:
    """Which of the examples `part` a row of `sequence_length` places can hold, by `SFTDataConfig.overlong`.

    Raises ValueError where they are to be refused and there are any, or none is left.
    """
    most, lengths = sequence_length + 1, examples.lengths
    index = np.arange(part.start, part.stop)
    long = index[lengths[index] > most]
    example = examples.where(long[0]) if len(long) else None
    if len(long) and overlong == "refuse":
        raise ValueError(
            f"{example} has {lengths[long[0]]} tokens, and data.sequence_length {sequence_length} leaves room for "
            f"{most}; {len(long)} of {len(index)} examples are longer, the longest has {lengths[long].max()}: raise "
            "data.sequence_length, or set data.overlong to truncate or drop"
        )
    used = np.minimum(lengths, most)
    written = np.concatenate(([0], np.cumsum(examples.chosen, dtype=np.int64)))
    starts = np.asarray(examples.starts[:-1])
    learnt = written[starts + used] - written[starts + 1]  # the first token is never a label
    keeps = learnt[index] > 0
    if overlong == "drop":
        keeps &= lengths[index] <= most
    dropped = int((~keeps).sum())
    if dropped == len(index):
        raise ValueError(
            f"none of the {len(index)} examples fits data.sequence_length {sequence_length} with a token of its answer;"
            " raise it"
        )
    return Fit(index[keeps], used, 0 if overlong == "drop" else len(long) - dropped, dropped, example)


class SFTDataset:
    """Rows of examples, for `GlobalBatches`.

    Args:
        examples, fit: what there is, and what of it is used.
        sequence_length: places of a row.
        packing: several examples in a row, which don't see each other, each with positions from 0; else one.
        seed: of the order; None is the order of the file.
        multiple_of: an epoch is filled up to a multiple of so many samples with empty ones.
        epochs, samples: how much of it: whole epochs, or as many as have at least so many samples.

    Attributes:
        lengths: int32, places of each sample that are used.
    """

    def __init__(
        self,
        examples: Examples,
        fit: Fit,
        sequence_length: int,
        *,
        packing: bool = True,
        seed: int | None = None,
        multiple_of: int = 1,
        epochs: int | None = None,
        samples: int | None = None,
    ) -> None:
        assert (epochs is None) != (samples is None)
        self.examples, self.fit, self.sequence_length = examples, fit, sequence_length
        self.document_mask = self.restart_positions = packing
        self._seed, self._multiple = seed, multiple_of
        members: list[np.ndarray] = []
        sizes: list[np.ndarray] = []
        count = 0
        while len(sizes) < epochs if epochs is not None else count < samples:
            rows = self._rows(len(sizes))
            members.append(np.fromiter((i for row in rows for i in row), np.int32))
            sizes.append(np.fromiter(map(len, rows), np.int32))
            count += len(rows)
        self._members = np.concatenate(members) if members else np.zeros(0, np.int32)
        self._ends = np.concatenate(([0], np.cumsum(np.concatenate(sizes) if sizes else [], dtype=np.int64)))
        used = np.concatenate(([0], np.cumsum(fit.lengths[self._members] - 1)))
        self.lengths = np.diff(used[self._ends]).astype(np.int32)

    def order(self, epoch: int) -> np.ndarray:
        """Its examples, in the order in which they are put into rows."""
        if self._seed is None:
            return self.fit.kept
        # NumPy promises these numbers to stay the same in all versions, of `default_rng` it does not.
        bits = np.random.MT19937(np.random.SeedSequence((self._seed, epoch)))
        return np.random.RandomState(bits).permutation(self.fit.kept)

    def _rows(self, epoch: int) -> list[list[int]]:
        order = self.order(epoch).tolist()
        if self.document_mask:
            rows = first_fit(self.fit.lengths - 1, order, self.sequence_length, OPEN_ROWS)
        else:
            rows = [[example] for example in order]
        return rows + [[]] * (-len(rows) % self._multiple)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def members(self, index: int) -> np.ndarray:
        """The examples of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}; build the dataset with more samples")
        return self._members[self._ends[index] : self._ends[index + 1]]

    def __getitem__(self, index: int) -> Sample:
        own = self.examples
        rows = lay(
            own.tokens,
            own.starts,
            self.fit.lengths,
            [self.members(index).tolist()],
            self.sequence_length,
            {"mask": own.chosen},
        )
        return Sample(
            rows.tokens_RW[0], rows.labels_RW[0], rows.columns["mask"][0], rows.positions_RW[0], rows.documents_RW[0]
        )


def build_sft_datasets(
    config: SFTDataConfig,
    prepared: PreparedExamples,
    batch: int,
    *,
    epochs: int | None = None,
    samples: int | None = None,
) -> tuple[SFTDataset, SFTDataset | None]:
    """What to train on, and the held-out examples, once and in their order; both in global batches of `batch`.

    epochs, samples: of the first (see `SFTDataset`).

    Raises ValueError where examples are too long and to be refused.
    """

    def made(folder: str, part: range | None, **options) -> SFTDataset:
        examples = Examples.open(folder)
        part = range(len(examples)) if part is None else part
        fitted = fit(examples, part, config.sequence_length, config.overlong)
        return SFTDataset(
            examples, fitted, config.sequence_length, packing=config.packing, multiple_of=batch, **options
        )

    first = _first(config)
    rest = range(first, first + prepared.examples)
    train = made(prepared.train, rest, seed=config.seed, epochs=epochs, samples=samples)
    if prepared.held_out is None:
        return train, None
    return train, made(prepared.held_out, range(first) if first else None, epochs=1)

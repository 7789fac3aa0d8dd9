"""From a `DataConfig` to datasets, in two steps: once on the driver, then on every rank.

`prepare` does what must happen once: it trains or loads the tokenizer, tokenizes raw text into the cache, and checks
that there is something to learn from and that its ids fit the vocabulary. `build_datasets` is cheap and runs on each
rank: it maps files and reads cached indices. Everything in the cache is named by a hash of what it was made from, so
the same corpus is never tokenized twice and a changed one is never taken for the old. (Naming by path and date would
spare reading the corpus, at some GB/s, and would trust dates.) On several nodes the cache has to be a shared folder.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from raytron.config import DataConfig
from raytron.data.blend import SURPLUS, BlendedDataset, blend_sizes, normalize
from raytron.data.corpus import find_files, plan_spans, read_span
from raytron.data.gpt import Documents, GPTDataset
from raytron.data.indexed import IndexedDataset, dataset_prefix
from raytron.data.mock import MockDocuments
from raytron.data.preprocess import PIECE_BYTES, preprocess
from raytron.data.tokenizer import HFTokenizer, Tokenizer, load_tokenizer, train_bpe, vocabulary_of

SPLITS = ("train", "valid", "test")
Dataset = GPTDataset | BlendedDataset

_BPE_BYTES_PER_ENTRY = 2 << 10  # of text to train on; more makes a vocabulary hardly better, and training take minutes


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made, small enough to send to every rank.

    `sources` are prefixes of indexed datasets, none for mock data; `max_token_id` is the largest id in any of them.
    """

    tokenizer_directory: str
    vocab_size: int
    eod: int
    pad: int | None
    sources: tuple[str, ...]
    weights: tuple[float, ...]
    documents: int
    tokens: int
    max_token_id: int
    cache_path: str

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_directory)


@dataclass(frozen=True)
class _Source:
    prefix: str
    documents: int
    tokens: int
    max_token_id: int


def prepare(config: DataConfig, cache_path: str | os.PathLike[str] | None = None, *, progress: bool = True) -> Prepared:
    """Do once what all ranks need; `config.cache_path` goes before `cache_path`.

    Raises ValueError, naming the field or file and the mend, where there is no data, it is empty or malformed, or its
    ids lie outside the tokenizer's vocabulary.
    """
    where = config.cache_path or cache_path
    if where is None:
        raise ValueError("data.cache_path is not set; name a folder for tokenized text and indices")
    cache = Path(where).absolute()
    blend = config.blend or (((1.0, config.path),) if config.path else ())
    if not blend and not config.mock:
        raise ValueError("data.path is not set; name a text, JSONL or Parquet file, a folder, or set data.mock")
    paths = [path for _, path in blend]
    with alone(cache):
        tokenizer = _tokenizer(config, paths, cache)
        directory = keep_tokenizer(tokenizer, cache)
        sources = [_source(config, path, tokenizer, cache, progress) for path in paths]
    return Prepared(
        tokenizer_directory=str(directory),
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        pad=tokenizer.pad,
        sources=tuple(source.prefix for source in sources),
        weights=tuple(weight for weight, _ in blend),
        documents=sum(source.documents for source in sources),
        tokens=sum(source.tokens for source in sources),
        max_token_id=max((source.max_token_id for source in sources), default=tokenizer.vocab_size - 1),
        cache_path=str(cache),
    )


@contextmanager
def alone(cache: Path) -> Iterator[None]:
    """Runs that share a cache (and ranks that all prepare) take turns, so the later ones find the work done."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given up with the file, however the process ends
        yield


def _tokenizer(config: DataConfig, paths: Sequence[str], cache: Path) -> Tokenizer:
    if not config.tokenizer.startswith("bpe:"):
        return load_tokenizer(config.tokenizer)
    size = vocabulary_of(config.tokenizer)
    files = find_files(raw) if (raw := [path for path in paths if dataset_prefix(path) is None]) else []
    if not files:
        raise ValueError(
            f"data.tokenizer {config.tokenizer!r} is trained on raw text, and there is none (mock or tokenized data):"
            " name the tokenizer that the data was made with, or 'null:SIZE' for mock data"
        )
    directory = cache / f"tokenizer-{fingerprint(files, 'bpe', size, config.json_key)}"
    if not directory.is_dir():
        _save_tokenizer(train_tokenizer(files, size, config.json_key), directory)
    return load_tokenizer(directory)


def train_tokenizer(files: Sequence[Path], vocab_size: int, json_key: str = "text") -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` entries, trained on an even selection of the files' text."""
    return train_bpe(_texts(files, json_key, vocab_size * _BPE_BYTES_PER_ENTRY), vocab_size)


def _texts(files: Sequence[Path], json_key: str, enough: int) -> Iterator[str]:
    """The corpus, or an even selection of about `enough` bytes of it."""
    spans = plan_spans(files, piece_bytes=1 << 16, json_key=json_key)
    stride = max(1, sum(span.size for span in spans) // enough)
    for span in spans[::stride]:
        yield from (text.text for text in read_span(span, json_key))


def keep_tokenizer(tokenizer: Tokenizer, cache: Path) -> Path:
    directory = cache / f"tokenizer-{tokenizer_key(tokenizer)}"
    if not directory.is_dir():
        _save_tokenizer(tokenizer, directory)
    return directory


def _save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:12]}")
    tokenizer.save(partial)
    if not directory.is_dir():
        partial.rename(directory)


def tokenizer_key(tokenizer: Tokenizer) -> str:
    if not isinstance(tokenizer, HFTokenizer):
        return f"{type(tokenizer).__name__}-{tokenizer.vocab_size}"
    import xxhash

    digest = xxhash.xxh3_128()
    for name in sorted(tokenizer.files):
        digest.update(f"{name}\n".encode() + tokenizer.files[name])
    return digest.hexdigest()


def fingerprint(files: Sequence[Path], *settings: object) -> str:
    """A hash of the names and contents of `files`, and of what else the result depends on."""
    import xxhash

    digest = xxhash.xxh3_128(json.dumps(settings).encode())
    for path in files:
        digest.update(f"\n{path.name}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _source(config: DataConfig, path: str, tokenizer: Tokenizer, cache: Path, progress: bool) -> _Source:
    prefix = dataset_prefix(path)
    if prefix is None:
        return _tokenized(config, path, tokenizer, cache, progress)
    source = _scanned(prefix, cache)
    if not source.tokens:
        raise ValueError(f"{prefix}.bin: the corpus is empty; preprocess some text into it")
    if source.max_token_id >= tokenizer.vocab_size:
        raise ValueError(
            f"{prefix}.bin holds token id {source.max_token_id}, outside the vocabulary of {tokenizer.vocab_size} of"
            f" data.tokenizer {config.tokenizer!r}; name the tokenizer that the data was made with"
        )
    return source


def _tokenized(config: DataConfig, path: str, tokenizer: Tokenizer, cache: Path, progress: bool) -> _Source:
    """Raw text, tokenized into the cache unless it is there."""
    files = find_files(path)
    # Splits and shuffles move whole documents of the index, so a few long files are cut into enough of them.
    piece_bytes = min(PIECE_BYTES, max(8 << 10, sum(file.stat().st_size for file in files) // 512))
    key = fingerprint(files, "text", config.json_key, piece_bytes, tokenizer_key(tokenizer))
    prefix = str(cache / f"text-{key}")
    record = Path(prefix + ".json")
    if not (record.is_file() and all(os.path.isfile(prefix + suffix) for suffix in (".bin", ".idx"))):
        summary = preprocess(
            files,
            prefix,
            tokenizer,
            json_key=config.json_key,
            workers=config.workers,
            piece_bytes=piece_bytes,
            progress=progress,
        )
        _write_record(record, _Source(prefix, summary.documents, summary.tokens, summary.max_token_id))
    IndexedDataset(prefix)  # a cached pair that was damaged since is reported here, before any rank starts
    return _Source(**{**json.loads(record.read_text()), "prefix": prefix})


def _scanned(prefix: str, cache: Path) -> _Source:
    """An indexed dataset of someone else's; its largest id is looked for once and remembered."""
    import xxhash

    dataset = IndexedDataset(prefix)
    key = xxhash.xxh3_128(json.dumps(dataset.identity).encode()).hexdigest()
    record = cache / f"scan-{key}.json"
    if not record.is_file():
        step = 1 << 24
        chunks = (dataset.tokens[start : start + step] for start in range(0, len(dataset.tokens), step))
        largest = max((int(chunk.max()) for chunk in chunks), default=-1)
        tokens = int(dataset.sequence_lengths.sum(dtype=np.int64))
        _write_record(record, _Source(dataset.prefix, len(dataset), tokens, largest))
    return _Source(**{**json.loads(record.read_text()), "prefix": dataset.prefix})


def _write_record(path: Path, source: _Source) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    partial.write_text(json.dumps(asdict(source)))
    partial.replace(path)


def build_datasets(
    config: DataConfig,
    prepared: Prepared,
    train_samples: int | None,
    valid_samples: int | None = 0,
    test_samples: int | None = 0,
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """The train, validation and test datasets with at least so many samples each (None: one epoch; 0: no dataset).

    The order of the samples depends on their number (it decides how many epochs are shuffled together), so a resumed
    run asks for the same numbers. The first call builds the indices and caches them, all others map them.

    Raises ValueError where a split that is asked for is empty.
    """
    wanted = (train_samples, valid_samples, test_samples)
    if prepared.sources:
        sources: list[Documents] = [IndexedDataset(prefix) for prefix in prepared.sources]
        split = config.split
    else:
        sources, split = [MockDocuments(prepared.vocab_size, prepared.eod)], "1,1,1"  # as in Megatron
    built = [
        _split(config, prepared, sources, split, part, samples) if samples != 0 else None
        for part, samples in enumerate(wanted)
    ]
    return built[0], built[1], built[2]


def _split(
    config: DataConfig, prepared: Prepared, sources: list[Documents], split: str, part: int, samples: int | None
) -> Dataset:
    indices = os.path.join(prepared.cache_path, "indices")
    weights = normalize(prepared.weights) if len(sources) > 1 else [1.0]
    if samples is None or len(sources) == 1:
        sizes: list[int | None] = [samples] * len(sources)
    else:
        sizes = list(blend_sizes(weights, samples, SURPLUS))
    names = [path for _, path in config.blend] or [config.path or "mock data"]
    datasets = [
        GPTDataset(
            source,
            _documents(source, split, part, name),
            size,
            sequence_length=config.sequence_length,
            seed=config.seed,
            eod=prepared.eod,
            pad=prepared.pad,
            split=SPLITS[part],
            document_mask=config.document_mask,
            reset_position_ids=config.reset_position_ids,
            eod_mask_loss=config.eod_mask_loss,
            cache_path=indices,
            name=name,
        )
        for source, size, name in zip(sources, sizes, names, strict=True)
    ]
    if len(datasets) == 1:
        return datasets[0]
    if samples is None:
        return BlendedDataset(datasets, None, None, indices)
    return BlendedDataset(datasets, weights, sum(blend_sizes(weights, samples)), indices)


def _documents(source: Documents, split: str, part: int, name: str) -> range:
    documents = split_ranges(split, len(source))[part]
    if not documents:
        raise ValueError(
            f"the {SPLITS[part]} split of {name} is empty: data.split {split!r} of its {len(source)} documents leaves"
            " none; give it a larger share, or more documents"
        )
    return documents


def split_ranges(split: str, documents: int) -> tuple[range, range, range]:
    """Megatron's split of documents 0..`documents` by weights such as "99,1,0"; a weight of 0 gives an empty range."""
    try:
        weights = [float(weight) for weight in split.split(",")]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 3 or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(f"data.split is {split!r}; write the weights of train, validation and test, such as '99,1,0'")
    shares = np.array([*weights, 0.0, 0.0][:3]) / np.sum(np.array([*weights, 0.0, 0.0][:3]))
    ranges = []
    begin = 0.0
    for share in shares.tolist():
        end = begin + share
        ranges.append(range(round(begin * documents), round(end * documents)))
        begin = end
    return ranges[0], ranges[1], ranges[2]


def unigram_entropy(dataset: Dataset) -> float:
    """Entropy of the tokens of one epoch of `dataset`, in nats: the loss of the best model that ignores context."""
    counts = dataset.token_counts()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())

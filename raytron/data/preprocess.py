"""Raw text to Megatron's ``.bin/.idx``, on all cores, streamed, with the same bytes for any number of workers.

The corpus is cut into spans (`raytron.data.corpus`), spans are grouped into units of some megabytes, each unit becomes
a small ``.bin/.idx`` pair in a temporary folder beside the output, and the pairs are merged in order as they get ready:

    driver     plan -> units --+--> worker --> unit-0.bin/.idx --+--> merge in order --> prefix.bin/.idx (renamed)
                               +--> worker --> unit-1.bin/.idx --+

Workers are plain subprocesses that speak JSON lines over their pipes. `multiprocessing` would import the caller's
script again in each of them (and so start it again where it lacks a ``__main__`` guard, as recipes may); forking is not
safe beside the threads of torch, ray and tokenizers. Small corpora are encoded in this process, on the tokenizer's own
threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Self

from raytron.data.corpus import Span, find_files, plan_spans, read_span, where
from raytron.data.indexed import IndexedDatasetWriter, token_dtype
from raytron.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from rich.progress import Progress

PIECE_BYTES = 1 << 20
_UNIT_BYTES = 8 << 20
_BATCH_CHARACTERS = 1 << 20  # a tokenizer holds some hundred bytes per character while it encodes a batch


@dataclass(frozen=True)
class PreprocessSummary:
    """What a run of `preprocess` wrote. `empty_documents` were skipped and `bytes_read` counts the input."""

    prefix: str
    documents: int
    tokens: int
    empty_documents: int
    max_token_id: int
    bytes_read: int
    vocab_size: int
    dtype: str
    seconds: float


@dataclass(frozen=True)
class _Job:
    """What a worker has to know once."""

    folder: str
    json_key: str
    append_eod: bool


@dataclass(frozen=True)
class _Done:
    """What a worker says of a unit that it has written."""

    documents: int
    tokens: int
    empty_documents: int
    max_token_id: int


def preprocess(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    json_key: str = "text",
    workers: int | None = None,
    append_eod: bool = True,
    progress: bool = True,
    text_documents: str = "file",
    piece_bytes: int = PIECE_BYTES,
) -> PreprocessSummary:
    """Tokenize `inputs` into ``{output_prefix}.bin/.idx``.

    `inputs`: .txt/.md, .jsonl (an object per line, its text under `json_key`), .parquet (column `json_key`), folders of
    them (searched in depth, in the order of names), or a list. A text file is one document, or with
    `text_documents="paragraph"` or "line" one per paragraph or line; a file longer than `piece_bytes` is stored in
    pieces, as several documents of the index. Documents without a token are skipped.

    `workers`: processes; by default one per core, fewer where there is little to do. The output doesn't depend on it.

    Raises ValueError, naming the file, the line or byte and the mend, for a missing or empty corpus, malformed JSON, a
    missing key or column, bytes that aren't UTF-8, and token ids outside the vocabulary. Nothing is left behind then,
    nor after Ctrl-C; an older pair of the same name stays.
    """
    started = time.monotonic()
    spans = plan_spans(find_files(inputs), piece_bytes=piece_bytes, json_key=json_key, text_documents=text_documents)
    total = sum(span.size for span in spans)
    workers = _worker_count(workers, len(spans), total)
    units = list(_units(spans, min(_UNIT_BYTES, total // (8 * workers))))
    prefix = os.path.abspath(output_prefix)
    dtype = token_dtype(tokenizer.vocab_size)
    os.makedirs(os.path.dirname(prefix), exist_ok=True)
    done: list[_Done] = []
    with tempfile.TemporaryDirectory(prefix=f".{os.path.basename(prefix)}.", dir=os.path.dirname(prefix)) as folder:
        job = _Job(folder, json_key, append_eod)
        with (
            IndexedDatasetWriter(prefix, dtype) as writer,
            _bar(total, progress) as bar,
            # Closed before the folder is: an error here must not leave workers writing into it.
            closing(_encoded(units, job, tokenizer, workers)) as encoded,
        ):
            for unit, result in encoded:
                part = Path(folder) / f"unit-{len(done)}"
                writer.merge(part)
                for suffix in (".bin", ".idx"):
                    part.with_name(part.name + suffix).unlink()
                bar.advance(bar.task_ids[0], sum(span.size for span in unit))
                done.append(result)
            if not sum(result.tokens for result in done):
                raise ValueError(f"{_names(inputs)}: the corpus is empty, no document has any text; add some")
    return PreprocessSummary(
        prefix=prefix,
        documents=sum(result.documents for result in done),
        tokens=sum(result.tokens for result in done),
        empty_documents=sum(result.empty_documents for result in done),
        max_token_id=max(result.max_token_id for result in done),
        bytes_read=total,
        vocab_size=tokenizer.vocab_size,
        dtype=str(dtype),
        seconds=time.monotonic() - started,
    )


def _names(inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> str:
    return os.fspath(inputs) if isinstance(inputs, (str, os.PathLike)) else ", ".join(map(os.fspath, inputs))


def _units(spans: Sequence[Span], unit_bytes: int) -> Iterator[list[Span]]:
    unit: list[Span] = []
    size = 0
    for span in spans:
        unit.append(span)
        size += span.size
        if size >= unit_bytes:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def _worker_count(asked: int | None, spans: int, total: int) -> int:
    if asked is not None and asked < 1:
        raise ValueError(f"workers={asked}: at least one process is needed")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A worker takes a second or two to start, in which a tokenizer's own threads encode some megabytes.
    wanted = min(cores, total // (32 << 20)) if asked is None else asked
    return max(1, min(wanted, spans))


def _bar(total: int, visible: bool) -> Progress:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    bar = Progress(
        TextColumn("preprocess"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        disable=not visible,
    )
    bar.add_task("preprocess", total=total)
    return bar


def _encoded(
    units: list[list[Span]], job: _Job, tokenizer: Tokenizer, workers: int
) -> Generator[tuple[list[Span], _Done], None, None]:
    """Each unit with its result, in order, as soon as both it and all before it are written."""
    if workers == 1:
        for number, unit in enumerate(units):
            yield unit, encode_unit(number, unit, job, tokenizer)
        return
    tokenizer.save(os.path.join(job.folder, "tokenizer"))
    with _Workers(workers, job) as pool:
        ahead: deque[Future[_Done]] = deque()
        for number, unit in enumerate(units):
            # Bounded, so that one slow unit doesn't let the rest of the corpus pile up as temporary files.
            for further in range(number + len(ahead), min(len(units), number + 4 * workers)):
                ahead.append(pool.submit(further, units[further]))
            yield unit, ahead.popleft().result()


def encode_unit(number: int, unit: Sequence[Span], job: _Job, tokenizer: Tokenizer) -> _Done:
    """Write one unit as ``unit-{number}.bin/.idx``."""
    documents = tokens = empty = 0
    largest = -1
    with IndexedDatasetWriter(os.path.join(job.folder, f"unit-{number}"), token_dtype(tokenizer.vocab_size)) as writer:
        for place, ids, ends in _encode(unit, job.json_key, tokenizer):
            if not ids:
                empty += 1
                continue
            if max(ids) >= tokenizer.vocab_size:
                raise ValueError(
                    f"{where(*place)}: token id {max(ids)} is outside the vocabulary of {tokenizer.vocab_size}; the"
                    " tokenizer's files contradict each other, export it again"
                )
            if job.append_eod and ends:
                ids.append(tokenizer.eod)
            writer.add_document(ids)
            documents, tokens, largest = documents + 1, tokens + len(ids), max(largest, max(ids))
    return _Done(documents, tokens, empty, largest)


def _encode(
    unit: Sequence[Span], json_key: str, tokenizer: Tokenizer
) -> Iterator[tuple[tuple[Span, int], list[int], bool]]:
    """(place, ids, whether a document ends) of every text of a unit, encoded in batches of bounded length."""
    batch: list[tuple[tuple[Span, int], str, bool]] = []
    held = 0
    for span in unit:
        for text, place, ends in read_span(span, json_key):
            batch.append(((span, place), text, ends))
            held += len(text)
            if held >= _BATCH_CHARACTERS:
                yield from _encode_batch(batch, tokenizer)
                batch, held = [], 0
    yield from _encode_batch(batch, tokenizer)


def _encode_batch(
    batch: list[tuple[tuple[Span, int], str, bool]], tokenizer: Tokenizer
) -> Iterator[tuple[tuple[Span, int], list[int], bool]]:
    try:
        encoded = tokenizer.encode_batch([text for _, text, _ in batch])
    except ValueError:
        for place, text, _ in batch:  # again, one by one, to say which
            try:
                tokenizer.encode(text)
            except ValueError as error:
                raise ValueError(f"{where(*place)}: {error}") from None
        raise
    for (place, _, ends), ids in zip(batch, encoded, strict=True):
        yield place, ids, ends


class _Workers:
    """Subprocesses that run `serve`, each fed by a thread of its own. Leaving ends them, at once after an error."""

    def __init__(self, count: int, job: _Job) -> None:
        self._logs = [os.path.join(job.folder, f"worker-{i}.log") for i in range(count)]
        self._processes = [_start_worker(log, job) for log in self._logs]
        self._threads = ThreadPoolExecutor(count)
        self._idle: SimpleQueue[int] = SimpleQueue()
        for index in range(count):
            self._idle.put(index)

    def submit(self, number: int, unit: Sequence[Span]) -> Future[_Done]:
        return self._threads.submit(self._run, number, unit)

    def _run(self, number: int, unit: Sequence[Span]) -> _Done:
        index = self._idle.get()
        process = self._processes[index]
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"number": number, "unit": [asdict(span) for span in unit]}) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            tail = Path(self._logs[index]).read_text(errors="replace")[-2000:]
            raise RuntimeError(
                f"a preprocessing worker ended with status {process.wait()} in a unit that begins with {unit[0].path};"
                f" if it ran out of memory, take fewer workers or smaller pieces\n{tail}"
            )
        self._idle.put(index)
        result = json.loads(answer)
        if "error" in result:
            raise ValueError(result["error"])
        return _Done(**result)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()  # every result that was wanted is in; killing spares a wait on units ahead of an error
        self._threads.shutdown(wait=True)
        for process in self._processes:
            process.communicate()


def _start_worker(log: str, job: _Job) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "TOKENIZERS_PARALLELISM": "false",  # one core each
    }
    code = "import sys; from raytron.data.preprocess import serve; serve(sys.argv[1])"
    with open(log, "wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is the driver's to handle
        )


def serve(job: str) -> None:
    """The loop of a worker: units as JSON lines on stdin, results on stdout, until stdin closes."""
    settings = _Job(**json.loads(job))
    tokenizer = load_tokenizer(os.path.join(settings.folder, "tokenizer"))
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        task = json.loads(line)
        try:
            unit = [Span(**span) for span in task["unit"]]
            answer = asdict(encode_unit(task["number"], unit, settings, tokenizer))
        except ValueError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)

"""Raw text to .bin/.idx: the same tokens whatever the cutting, the format and the workers; and every bad input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytron.data import ByteTokenizer, IndexedDataset, NullTokenizer, load_tokenizer, preprocess, train_bpe
from raytron.data.corpus import find_files, plan_spans, read_span

BYTE = ByteTokenizer()


def documents(prefix) -> list[str]:
    """What the pair holds, one text per end of document."""
    tokens = IndexedDataset(prefix).tokens.tolist()
    assert tokens[-1] == BYTE.eod
    texts: list[list[int]] = [[]]
    for token in tokens:
        if token == BYTE.eod:
            texts.append([])
        else:
            texts[-1].append(token)
    return [BYTE.decode(ids) for ids in texts[:-1]]


def run(inputs, tmp_path, tokenizer=BYTE, **options):
    return preprocess(inputs, tmp_path / "out", tokenizer, progress=False, **options)


def write_formats(folder: Path, texts: list[str]) -> list[Path]:
    folder.mkdir()
    jsonl, parquet = folder / "a.jsonl", folder / "b.parquet"
    jsonl.write_text("".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n" for text in texts))
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), parquet, row_group_size=2)
    return [jsonl, parquet]


def test_every_format_gives_the_same_documents(tmp_path) -> None:
    texts = ["one", "två\nlines", "日本語 🙂", "", "last\r\n"]
    kept = [text for text in texts if text]
    jsonl, parquet = write_formats(tmp_path / "in", texts)
    for file in (jsonl, parquet):
        summary = run(file, tmp_path)
        assert documents(tmp_path / "out") == kept
        assert (summary.documents, summary.empty_documents, summary.max_token_id) == (4, 1, 256)
        assert (
            summary.tokens == sum(len(text.encode()) + 1 for text in kept) == len(IndexedDataset(summary.prefix).tokens)
        )
    (tmp_path / "in" / "c").mkdir()
    (tmp_path / "in" / "c" / "z.txt").write_bytes(b"\xef\xbb\xbf" + b"with a mark")
    (tmp_path / "in" / "c" / "a.md").write_text("sorted")
    (tmp_path / "in" / "c" / "skipped.png").write_bytes(b"\x89PNG")
    (tmp_path / "in" / ".hidden.txt").write_text("hidden")
    summary = run(tmp_path / "in", tmp_path)
    assert documents(summary.prefix) == [*kept, *kept, "sorted", "with a mark"]
    assert documents(run([parquet, tmp_path / "in" / "c" / "a.md"], tmp_path).prefix) == [*kept, "sorted"]


def test_json_lines_by_another_key_and_without_eod(tmp_path) -> None:
    (tmp_path / "a.json").write_text('{"question": "ab"}\r\n\n{"question": "c"}')
    summary = run(tmp_path / "a.json", tmp_path, json_key="question", append_eod=False)
    assert IndexedDataset(summary.prefix).tokens.tolist() == [97, 98, 99]
    assert summary.documents == 2


def test_text_documents(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\r\n \r\n\n  three\n\n\n\nfour\n")
    run(tmp_path / "a.txt", tmp_path)
    assert documents(tmp_path / "out") == ["one\ntwo\r\n \r\n\n  three\n\n\n\nfour\n"]
    run(tmp_path / "a.txt", tmp_path, text_documents="paragraph")
    assert documents(tmp_path / "out") == ["one\ntwo", "  three", "four"]
    run(tmp_path / "a.txt", tmp_path, text_documents="line")
    assert documents(tmp_path / "out") == ["one", "two", "  three", "four"]


PIECES = st.lists(
    st.sampled_from(["a", "Zz ", "\n", "\n\n", " \n", "é", "日\n", "x" * 20, "\r\n", "\u3000"]), max_size=40
)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=PIECES, piece_bytes=st.integers(1, 60), kind=st.sampled_from(["file", "paragraph", "line"]))
def test_cutting_neither_loses_nor_tears_anything(parts, piece_bytes, kind, tmp_path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("".join(parts).encode())

    def texts(size: int) -> list[str]:
        spans = plan_spans([file], piece_bytes=size, json_key="text", text_documents=kind)
        assert [s.begin for s in spans] == [0, *(s.end for s in spans)][: len(spans)]
        return [text.text for span in spans for text in read_span(span, "text")]

    if kind == "file":
        assert "".join(texts(piece_bytes)) == "".join(texts(1 << 20)) == "".join(parts)
    else:
        assert texts(piece_bytes) == texts(1 << 20)


def test_a_long_file_becomes_pieces_with_the_ids_of_the_whole(tmp_path) -> None:
    text = "".join(f"def f_{i}(x):\n    return x + {i}\n\n\nThe line {i} of prose.\nAnd more.\n" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    bpe = train_bpe([text], 400)
    run(tmp_path / "a.txt", tmp_path, bpe, piece_bytes=1000)
    dataset = IndexedDataset(tmp_path / "out")
    assert len(dataset) > 10
    assert dataset.tokens.tolist() == [*bpe.encode(text), bpe.eod]


def test_workers_change_nothing(tmp_path) -> None:
    texts = [f"Document {i} says {'so ' * (i % 40)}and ends." for i in range(400)]
    folder = tmp_path / "in"
    write_formats(folder, texts)
    (folder / "c.txt").write_text("\n".join(texts))
    tokenizer = train_bpe(texts, 300)
    outputs = []
    for workers in (1, 3):
        summary = preprocess(
            folder, tmp_path / f"out{workers}", tokenizer, workers=workers, piece_bytes=400, progress=False
        )
        outputs.append([Path(summary.prefix + suffix).read_bytes() for suffix in (".bin", ".idx")])
    assert outputs[0] == outputs[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "in",
        *(f"out{w}.{s}" for w in (1, 3) for s in ("bin", "idx")),
    ]


def bad_jsonl(path: Path) -> None:
    path.write_text('{"text": "fine"}\n\n{"text": "also"}\n{"text": oops}\n{"text": "fine"}\n')


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"text": oops}\n',
            r"a\.jsonl line 3: malformed JSON .*column 10.*mend or remove",
        ),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl line 1: a JSON list where an object is needed"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "x", "id": 1}\n',
            r"line 2: no key 'text', there is body, id; set json_key",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: 'text' holds int, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: half of a surrogate pair \(\\ud800\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl: byte 24 \(0xff\) isn't UTF-8; convert"),
        ("a.txt", b"abc\xe9def", r"a\.txt: byte 3 \(0xe9\) isn't UTF-8"),
        ("a.txt", b"\xef\xbb\xbfabc\xe9", r"a\.txt: byte 6 \(0xe9\)"),
        ("a.txt", b"", r"a\.txt: the corpus is empty"),
        ("a.jsonl", b'{"text": ""}\n', r"a\.jsonl: the corpus is empty"),
        ("a.parquet", b"PAR1 no more", r"a\.parquet isn't a readable Parquet file"),
        ("a.docx", b"text", r"a\.docx: can't tell its format .* call it \.txt"),
    ],
)
def test_bad_files_are_named(name, content, says, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        run(tmp_path / name, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_lines_are_counted_from_the_start_of_the_file(tmp_path) -> None:
    lines = [json.dumps({"text": "x" * 50})] * 40
    lines[33] = '{"text": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"a\.jsonl line 34: malformed"):
        run(tmp_path / "a.jsonl", tmp_path, piece_bytes=300)


def test_bad_columns(tmp_path) -> None:
    pq.write_table(pa.table({"text": [1, 2, 3], "body": ["a", None, "b"]}), tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'content', there is text, body; set json_key"):
        run(tmp_path / "a.parquet", tmp_path, json_key="content")
    with pytest.raises(ValueError, match=r"a\.parquet row 0: 'text' holds int"):
        run(tmp_path / "a.parquet", tmp_path)
    assert documents(run(tmp_path / "a.parquet", tmp_path, json_key="body").prefix) == ["a", "b"]


def test_bad_arguments(tmp_path) -> None:
    with pytest.raises(ValueError, match="isn't there: name a text"):
        run(tmp_path / "nothing.txt", tmp_path)
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"no \.txt, \.md, \.jsonl or \.parquet file"):
        run(tmp_path / "in", tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="workers=0"):
        run(tmp_path / "a.txt", tmp_path, workers=0)
    with pytest.raises(ValueError, match="a document is one of file, paragraph, line"):
        run(tmp_path / "a.txt", tmp_path, text_documents="page")


def test_ids_outside_the_vocabulary(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "1 2"}\n{"text": "3 11"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl line 2: token id 11 is outside the vocabulary of 11"):
        run(tmp_path / "a.jsonl", tmp_path, NullTokenizer(10))

    class Wrong(ByteTokenizer):
        vocab_size = 100

        def __init__(self) -> None:
            super().__init__()
            self.vocab_size = 100

    (tmp_path / "b.txt").write_text("az")
    with pytest.raises(ValueError, match=r"b\.txt from byte 0: token id 122 is outside the vocabulary of 100"):
        run(tmp_path / "b.txt", tmp_path, Wrong())


def test_errors_of_workers_are_those_of_one_process(tmp_path) -> None:
    for name in "abcd":
        bad_jsonl(tmp_path / f"{name}.jsonl")
    files = find_files(tmp_path)
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"a\.jsonl line 4: malformed JSON"):
            run(files, tmp_path, workers=workers, piece_bytes=8)
    assert find_files(tmp_path) == files
    assert len(list(tmp_path.iterdir())) == 4


def test_a_worker_that_dies_is_reported(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("long enough")
    with pytest.raises(RuntimeError, match=r"worker ended with status 1 in a unit that begins with .*[ab]\.txt"):
        run(tmp_path, tmp_path, workers=2, piece_bytes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_ctrl_c_leaves_nothing(tmp_path) -> None:
    """The driver gets SIGINT while one of its workers waits for a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "fifo")
    script = f"""
import os, signal, sys
from pathlib import Path
from raytron.data import ByteTokenizer, preprocess as run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
preprocess = sys.modules["raytron.data.preprocess"]
Path({str(tmp_path)!r}, "a.txt").write_text("text " * 10)
Path({str(tmp_path)!r}, "b.txt").write_text("text " * 10)
plan = preprocess.plan_spans
fifo = preprocess.Span({str(tmp_path / "fifo")!r}, "file", 0, 10, 10)
def with_fifo(*args, **kwargs):
    spans = plan(*args, **kwargs)
    return [preprocess.Span(s.path, s.kind, s.begin, s.end, 10**6) for s in (spans[0], fifo, spans[1])]
preprocess.plan_spans = with_fifo
submit = preprocess._Workers.submit
def submitted(self, number, unit):
    future = submit(self, number, unit)
    print(number, *(process.pid for process in self._processes), flush=True)
    return future
preprocess._Workers.submit = submitted
run({str(tmp_path)!r}, {str(tmp_path / "out")!r}, ByteTokenizer(), workers=2, piece_bytes=1000, progress=False)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        workers = [process.stdout.readline().split()[1:] for _ in range(3)][-1]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "fifo"]
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_real_text(shared, tmp_path) -> None:
    text = (shared / "tinyshakespeare" / "input.txt").read_text()
    run(shared / "tinyshakespeare" / "input.txt", tmp_path, piece_bytes=1 << 14)
    assert documents(tmp_path / "out") == [text]
    lines = (shared / "gsm8k" / "test.jsonl").read_text().splitlines()
    summary = run(shared / "gsm8k" / "test.jsonl", tmp_path, json_key="question")
    assert documents(summary.prefix) == [json.loads(line)["question"] for line in lines]


def test_specs_of_saved_tokenizers_reach_the_workers(tmp_path) -> None:
    """Workers load the tokenizer from its saved directory; the null kind must still refuse what it refuses here."""
    NullTokenizer(10).save(tmp_path / "null")
    with pytest.raises(ValueError, match="outside the vocabulary of 11"):
        load_tokenizer(tmp_path / "null").encode("12")

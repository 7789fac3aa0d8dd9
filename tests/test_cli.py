"""The `raytron` command: it answers at once, does what the library does, and says in one line what is wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from raytron.checkpoint import CheckpointManager, save_pretrained
from raytron.cli import COMMANDS, Eval, _print_table, main, model_directory, parse
from raytron.config import DataConfig, TrainConfig, report_error
from raytron.data import ByteTokenizer, IndexedDataset, load_tokenizer
from raytron.models import build, from_pretrained
from raytron.models.arch import DecoderConfig
from raytron.training import TrainEngine

ARCH = DecoderConfig(
    vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
TEXT = "".join(f"{n} bottles of milk on the wall, take one down\n\n" for n in range(60))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a byte tokenizer."""
    path = tmp_path_factory.mktemp("cli") / "model"
    save_pretrained(build(ARCH, seed=0), path, tokenizer=ByteTokenizer())
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "text.txt"
    path.write_text(TEXT)
    return path


def measured(capsys: pytest.CaptureFixture, *args: object) -> dict:
    """What `raytron eval ARGS --json` prints."""
    capsys.readouterr()
    main(["eval", *map(str, args), "--sequence-length", "32", "--json"])
    return json.loads(capsys.readouterr().out)


def in_a_process(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env)


def test_help_and_version_need_nothing_heavy():
    lines = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    code = f"""
import sys
from raytron.cli import main
for line in {lines}:
    try:
        main(line)
    except SystemExit as end:
        assert end.code == 0
print([name for name in ("torch", "ray", "numpy", "transformers", "pyarrow", "rich") if name in sys.modules])
"""
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"usage: raytron {name}" in done.stdout for name in COMMANDS)


def test_models_lists_the_published_sizes(capsys: pytest.CaptureFixture):
    main(["models", "--json"])
    rows = {row["preset"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["llama3-8b"]["parameters"] == 8_030_261_248
    assert rows["llama3.2-1b"]["parameters"] == 1_235_814_400
    _print_table(list(rows.values()))
    table = capsys.readouterr().out
    assert all(name in table for name in rows), "a narrow terminal must not swallow the names"


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_preprocess_writes_the_documents_and_keeps_the_tokenizer(tokenizer: str, text: Path, tmp_path: Path):
    prefix = tmp_path / "tokens"
    options = ["--tokenizer", tokenizer, "--text-documents", "paragraph", "--quiet"]
    main(["preprocess", str(text), "--output", str(prefix), *options])
    kept, dataset = load_tokenizer(f"{prefix}-tokenizer"), IndexedDataset(prefix)
    documents = [dataset.get(i).tolist() for i in range(len(dataset))]
    assert [kept.decode(d) for d in documents] == TEXT.rstrip("\n").split("\n\n")
    assert all(d[-1] == kept.eod for d in documents)


def test_convert_casts_and_cuts(model: Path, tmp_path: Path):
    main(["convert", str(model), str(tmp_path / "small"), "--dtype", "bf16", "--shard-mb", "0.02"])
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    ours, theirs = from_pretrained(tmp_path / "small"), from_pretrained(model)
    assert torch.equal(ours.weights, theirs.weights.bfloat16().float())


def test_eval_of_a_model_that_knows_nothing_is_the_entropy_of_a_die(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    save_pretrained(build(ARCH), tmp_path / "zeros", tokenizer=ByteTokenizer())
    found = measured(capsys, tmp_path / "zeros", text)
    assert found["loss"] == pytest.approx(math.log(257), rel=1e-6)
    assert found["perplexity"] == pytest.approx(257, rel=1e-5)
    assert found["tokens"] == len(TEXT.encode()) // 32 * 32  # whole samples


def test_eval_is_the_mean_over_every_sample_whatever_the_batch(model: Path, text: Path, capsys: pytest.CaptureFixture):
    tokens = torch.tensor([*TEXT.encode(), 256])
    inputs, labels = tokens[:-1], tokens[1:]
    whole = len(labels) // 32 * 32
    logits = from_pretrained(model)(inputs[:whole].view(-1, 32))
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:whole]).item()
    for size in (1, 5):
        assert measured(capsys, model, text, "--batch-size", size)["loss"] == pytest.approx(expected, rel=1e-5)


def test_eval_finds_the_model_of_a_checkpoint_and_of_a_run(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    engine = TrainEngine(build(ARCH, seed=1), TrainConfig())
    saved = CheckpointManager(tmp_path / "run/checkpoints", asynchronous=False).save(engine, ByteTokenizer()).result()
    assert saved.ok, saved.error
    checkpoint = tmp_path / "run/checkpoints/step_00000000"
    (tmp_path / "run/config.json").write_text("{}")  # a run has one too, and it is no model's
    places = (tmp_path / "run", tmp_path / "run/checkpoints", checkpoint, checkpoint / "model")
    assert {model_directory(str(place)) for place in places} == {str(checkpoint / "model")}
    assert measured(capsys, tmp_path / "run", text, "--samples", 3)["tokens"] == 96
    flip_a_bit(checkpoint / "model/model.safetensors")
    with pytest.raises(ValueError, match=r"model/model.safetensors: its bytes are not those that were written"):
        measured(capsys, tmp_path / "run", text)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["eval", "{tmp}", "{text}"], "no model; give a Hugging Face directory"),
        (["eval", "{model}", "{text}", "--sequence-length", "65"], "max_position_embeddings 64"),
        (["eval", "{model}", "{text}", "--tokenizer", "null:999"], "1000 entries and the model's vocab_size is 257"),
        (["eval", "{model}", "{text}", "--tokenizer", "bpe:300"], "has to be trained first"),
        (["eval", "{model}", "{tmp}/none.txt"], "isn't there"),
        (["convert", "{model}", "{model}"], "can't be converted into itself"),
        (["preprocess", "{tmp}", "--output", "{tmp}/x", "--tokenizer", "byte"], "nothing to read"),
        (["preprocess", "{text}", "--output", "{tmp}/x", "--tokenizer", "nope"], "tokenizer 'nope' isn't there"),
        (["scale", "{tmp}", "--num-workers", "2"], "give its folder, or set RAY_ADDRESS"),
        (["scale", "{tmp}", "--engines", "2"], "give its folder, or set RAY_ADDRESS"),
        (["chaos", "{tmp}"], "give its folder, or set RAY_ADDRESS"),
    ],
)
def test_bad_input_is_a_value_error_with_the_mend(
    args: list[str], message: str, model: Path, text: Path, tmp_path: Path
):
    named = {"model": model, "text": text, "tmp": tmp_path}
    with pytest.raises(ValueError, match=message):
        main([arg.format(**named) for arg in args])


@pytest.mark.parametrize(
    "args",
    [
        ["eval", "a", "b", "--samples", "0"],
        ["preprocess", "--output", "x"],
        ["chaos", "x", "--kill-every", "soon"],
        ["reshape", "x"],
        ["scale", "x"],
        ["scale", "x", "--num-workers", "2", "--engines", "2"],
        ["nope"],
        [],
    ],
)
def test_a_slip_on_the_command_line_ends_with_2(args: list[str], capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        parse(args)
    assert end.value.code == 2
    assert capsys.readouterr().err


def test_errors_are_one_line_and_the_traceback_is_there_for_the_asking():
    code = "import sys; sys.argv[1:] = ['eval', 'none', 'none.txt']; from raytron.cli import main; main()"
    done = in_a_process(code)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "none: no model; give a Hugging Face directory, a checkpoint, or a run that has saved one"
    ]
    done = in_a_process(code, RAYTRON_DEBUG="1")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")


@pytest.mark.parametrize(
    ("kind", "code", "shown"),
    [("KeyboardInterrupt", 130, ""), ("OSError('full')", 2, "full\n"), ("TypeError", 1, None)],
)
def test_how_a_process_ends(kind: str, code: int, shown: str | None):
    done = in_a_process(f"import sys; from raytron.config import report_error as r; sys.excepthook = r; raise {kind}")
    assert done.returncode == code
    assert done.stderr == shown if shown is not None else done.stderr.startswith("Traceback")


def test_errors_are_red_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.delenv("RAYTRON_DEBUG", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(SystemExit):
        report_error(ValueError, ValueError("bad"), None)
    assert capsys.readouterr().err == "\033[31mbad\033[0m\n"


def test_defaults_are_those_of_a_run():
    given = parse(["eval", "model", "data"])
    assert isinstance(given, Eval)
    run = DataConfig()
    assert (given.seed, given.json_key, given.document_mask) == (run.seed, run.json_key, run.document_mask)

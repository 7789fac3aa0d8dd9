"""A run whose hardware computes and holds wrong numbers now and then: its losses are those of a quiet one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytron.actors.journal import read_journal
from raytron.config import (
    CheckpointConfig,
    DataConfig,
    FailureConfig,
    GuardConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    ScalingConfig,
)
from raytron.metrics import StepRecord, read_records
from raytron.pretrain import Run
from raytron.training.task import PretrainTask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
TINY = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


class Unsound(PretrainTask):
    """Rank 1's gradient is wrong once in step 3, and a bit of its weights flips, once, before step 6."""

    done: tuple[int, ...] = ()

    def train_step(self) -> StepRecord | None:
        step, undo = self.engine.counters.step + 1, int
        if self.world.rank == 1 and step in (3, 6) and step not in self.done:
            self.done = (*self.done, step)
            param = self.engine.model.trained[0].param
            if step == 3:
                first = [torch.nan]
                undo = param.register_hook(lambda grad: grad * (first.pop() if first else 1.0)).remove
            else:
                param.data.view(-1).view(torch.int32)[9] ^= 1 << 20
        try:
            return super().train_step()
        finally:
            undo()


class _Unsound(Run):
    task = Unsound


def config(folder: Path, name: str) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(preset="llama-3m", overrides=TINY),
        data=DataConfig(mock=True, tokenizer="null:127", sequence_length=32),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4),
        guard=GuardConfig(agreement_interval=1),
        global_batch_size=8,
        steps=8,
        logging=LoggingConfig(tensorboard=False),
        run=RunConfig(name, str(folder), FailureConfig(-1), CheckpointConfig(interval=4)),
        scaling=ScalingConfig(num_workers=2),
    )


@pytest.fixture(scope="module", autouse=True)
def ray_of_this_module():
    """Runs join the Ray they find: one for both."""
    from raytron.actors import Session

    with Session(slots=2):
        yield


def losses(folder: Path, name: str) -> list[tuple[int, float]]:
    records = read_records(folder / name / "metrics.jsonl")
    return [(record.step, record.loss) for record in records if isinstance(record, StepRecord)]


def test_the_losses_are_the_quiet_runs_and_the_journal_says_whose_numbers_were_wrong(tmp_path):
    Run(config(tmp_path, "quiet")).drive()
    quiet = read_journal(tmp_path / "quiet" / "journal.jsonl")
    assert not [event for event in quiet if event["event"] in ("verdict", "fault")]
    _Unsound(config(tmp_path, "unsound")).drive()
    assert losses(tmp_path, "unsound") == losses(tmp_path, "quiet")
    assert [step for step, _ in losses(tmp_path, "quiet")] == [*range(1, 9)]
    journal = read_journal(tmp_path / "unsound" / "journal.jsonl")
    (verdict,) = [event for event in journal if event["event"] == "verdict"]
    assert (verdict["step"], verdict["kind"], verdict["ranks"], verdict["mended"]) == (3, "hardware", [1], True)
    assert len(verdict["hosts"]) == 1
    (wrong, right), *_ = verdict["digests"].values()
    assert wrong != right
    (fault,) = [event for event in journal if event["event"] == "fault"]
    assert "ReplicasDisagree" in fault["what"]
    (said,) = [event["what"] for event in journal if event["event"] == "disagreement"]
    assert "weights of model.embed_tokens.weight differ between rank 0 (" in said
    assert "), rank 1 (" in said
    assert [event["action"] for event in journal if event["event"] == "decided"] == ["rewind"]
    assert [event["event"] for event in journal if event["event"] in ("recovered", "rewound")] == ["rewound"]

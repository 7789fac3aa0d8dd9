"""A run whose rewards a language model gives: a real one, behind our own server, that sometimes gives none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from raytron import rl
from raytron.actors import Session
from raytron.config import RunConfig
from raytron.metrics import read_timeline
from raytron.rl.buffer import Journal
from raytron.rl.config import JudgeConfig, RewardConfig
from recipes.grpo import config as recipe
from tests.serving.conftest import save_model, serving


@pytest.mark.slow
def test_a_run_is_rewarded_by_a_judge_whose_failures_are_counted(cluster: Session, tmp_path: Path):
    with serving(save_model(tmp_path / "judge")) as live:
        judge = JudgeConfig(
            url=f"{live.url}/v1",
            model="tiny",
            template="How good is {response} for {prompt}?",
            best=7.0,  # a grade above it is no grade
            request={"regex": "Score: [0-9]", "temperature": 1.0, "max_tokens": 16},
        )
        config = replace(
            recipe,
            steps=4,
            prompts=4,
            group_size=8,
            reward=RewardConfig(judge=judge),
            evaluation=replace(recipe.evaluation, prompts=4),
            run=RunConfig(name="judged", storage_path=str(tmp_path)),
            logging=replace(recipe.logging, tensorboard=False),
        )
        result = rl.run(config)
    groups = list(Journal(tmp_path / "judged" / "rollouts.jsonl").recover())
    answers = [t for group in groups for t in group.trajectories]
    failed = [t for t in answers if t.reward is None]
    assert 0 < len(failed) < len(answers)
    assert all("LLMJudge: JudgeError: no score from 0 to 7" in t.info["error"] for t in failed)
    assert {round(7 * t.reward, 5) for t in answers if t.reward is not None} <= set(range(8))
    assert result.metrics["rollout/excluded_total"] == len(failed)
    spans = read_timeline(tmp_path / "judged" / "timeline.json")
    assert {span.name for span in spans if span.lane == "judge"} == {"judging"}

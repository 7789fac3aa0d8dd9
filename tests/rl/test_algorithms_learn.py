"""Whole updates on policies that are tables of logits: every algorithm learns, and the KL penalty holds where it must.

sample -> prepare -> updates -> loss -> Adam, as a driver and a trainer do it, in float64
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raytron.rl.algorithms import ALGORITHMS, Algorithm, make
from raytron.rl.config import AlgorithmConfig
from raytron.rl.types import Batch, Group, Trajectory
from tests.rl.batches import tokens_of

PROMPTS, SIZE, VOCABULARY = 4, 8, 5
MARKS = np.array([False, True, False, True])  # prompt, answer, observation, answer


class Tables:
    """A policy with a logit for each prompt, turn and token, and a critic with a number for each prompt and turn."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.logits = torch.zeros(PROMPTS, 2, VOCABULARY, dtype=torch.float64, requires_grad=True)
        self.values = torch.zeros(PROMPTS, 2, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits, self.values], lr=0.1)

    def rollout(self, random: np.random.Generator, logits: torch.Tensor) -> Batch:
        """Groups of two turns each, rewarded for every answer that repeats the prompt."""
        log_p = logits.detach().log_softmax(-1).numpy()
        groups = []
        for prompt in range(PROMPTS):
            answers = [[random.choice(VOCABULARY, p=np.exp(turn)) for turn in log_p[prompt]] for _ in range(SIZE)]
            groups.append(Group(prompt, tuple(self._trajectory(prompt, log_p[prompt], two) for two in answers)))
        kept = [group for group in groups if self.algorithm.keep(group)]
        return Batch.of(kept or groups)

    def _trajectory(self, prompt: int, log_p: np.ndarray, answers: list[int]) -> Trajectory:
        logprobs = np.zeros(4)
        logprobs[MARKS] = log_p[[0, 1], answers]
        tokens = np.array([prompt, answers[0], prompt, answers[1]])
        return Trajectory(tokens, MARKS, logprobs, np.zeros(4), float(np.mean(np.array(answers) == prompt)))

    def step(self, batch: Batch) -> None:
        """What a trainer does with a batch."""
        wanted = {"old": self.algorithm.needs_old, "reference": self.algorithm.needs_reference}
        logprobs, uniform = self._logprobs(batch).detach().numpy(), np.full(batch.tokens.shape, -np.log(VOCABULARY))
        fields = {"old": logprobs, "reference": uniform}
        batch = batch.having(**{name: fields[name] for name in wanted if wanted[name]})
        if self.algorithm.needs_critic:
            batch = batch.having(values=self._spread(batch, self.values).detach().numpy())
        for update in self.algorithm.updates(self.algorithm.prepare(batch)):
            self.optimizer.zero_grad()
            self._loss(update).backward()
            self.optimizer.step()

    def _loss(self, batch: Batch) -> torch.Tensor:
        tokens = tokens_of(batch, self._logprobs(batch))
        loss_T = self.algorithm.loss(tokens)[0]
        if self.algorithm.needs_critic:
            loss_T = loss_T + self.algorithm.value_loss(self._spread(batch, self.values), tokens)
        return (tokens.extra["weights"] * loss_T).sum()

    def _logprobs(self, batch: Batch) -> torch.Tensor:
        log_p = self._spread(batch, self.logits.log_softmax(-1))
        return log_p.gather(-1, torch.tensor(batch.tokens, dtype=torch.int64)[:, None])[:, 0]

    def _spread(self, batch: Batch, table: torch.Tensor) -> torch.Tensor:
        """The entry of each token's prompt and turn."""
        prompts = torch.tensor(batch.groups[batch.rows])
        turns = torch.tensor(np.tile([0, 0, 1, 1], len(batch)))
        return table[prompts, turns]

    def expected_reward(self) -> float:
        right = torch.arange(PROMPTS)
        return self.logits.detach().softmax(-1)[right, :, right].mean().item()


def trained(config: AlgorithmConfig, steps: int, staleness: int = 0) -> float:
    """Expected reward over the last 20 steps, from the uniform policy on, with samples of `staleness` steps ago."""
    tables, random = Tables(make(config)), np.random.default_rng(0)
    history, rewards = [tables.logits.detach().clone()] * (staleness + 1), []
    for _ in range(steps):
        tables.step(tables.rollout(random, history[0]))
        history = [*history[1:], tables.logits.detach().clone()]
        rewards.append(tables.expected_reward())
    return float(np.mean(rewards[-20:]))


CONSTANT = {"dr_grpo": {"constant_length": 2}}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_learns_with_its_own_settings(name):
    assert trained(AlgorithmConfig(name, **CONSTANT.get(name, {})), 60) > 0.95


@pytest.mark.parametrize("name", ALGORITHMS)
def test_learns_from_stale_samples_in_several_updates(name):
    config = AlgorithmConfig(name, **CONSTANT.get(name, {}), minibatches=2)
    assert trained(config, 80, staleness=2) > 0.9


@pytest.mark.parametrize("correction", ["tis", "sequence-tis", "icepop", "mask-token"])
def test_learns_with_corrections(correction):
    assert trained(AlgorithmConfig("grpo", correction=correction, minibatches=2), 60, staleness=1) > 0.9


@pytest.mark.parametrize(
    ("name", "kl"),
    [
        ("rloo", {"kl": "reward"}),
        ("rloo", {"kl": "loss", "kl_estimator": "k2"}),
        ("rloo", {"kl": "loss", "kl_estimator": "k3"}),
        ("reinforce_pp", {"kl": "reward", "normalize_std": False}),
        ("ppo", {"kl": "reward", "normalize_std": False}),
    ],
)
def test_the_penalty_holds_the_policy_where_theory_says(name, kl):
    """At the optimum of E[R] - beta KL(pi || ref), pi is in proportion to ref exp(R / beta) (Ziebart 2010)."""
    beta, right = 0.25, 0.5  # each of the two answers is worth a half
    optimum = np.exp(right / beta) / (np.exp(right / beta) + VOCABULARY - 1)
    assert trained(AlgorithmConfig(name, **kl, kl_coefficient=beta), 100) == pytest.approx(optimum, abs=0.04)
    assert trained(AlgorithmConfig(name), 60) > optimum + 0.2

"""What every algorithm is: which groups to keep, what a token was worth, and a loss per token. It knows no driver.

    driver, numpy:  keep(group) -> prepare(batch) -> updates(batch)          trainer, torch:  loss(tokens), value_loss

A family member states its defaults and overrides the one or two methods that make it what it is. The trainer's loss is
sum_T(weights x loss), over all micro-batches and ranks, with the weights `prepare` computed from the whole batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from raytron.rl.advantages import group_advantages, overlong_charge, varies
from raytron.rl.algorithms.settings import resolved
from raytron.rl.config import AlgorithmConfig
from raytron.rl.corrections import CORRECTIONS
from raytron.rl.kl import k1, k3, kl_loss
from raytron.rl.reductions import reduction_weights
from raytron.rl.surrogate import bounded_exp, clipped_surrogate
from raytron.rl.types import Batch, Group, Tokens

__all__ = ["METRICS", "Algorithm"]

METRICS = ("kl", "ratio", "clip_fraction", "mismatch", "bit_equal", "rho", "rho_squared", "entropy")
"""Per token, their mean over chosen tokens is what to log:
    kl             k3 estimate of KL(anchor || current), the anchor being what the ratio is taken against; nats
    ratio          current / anchor
    clip_fraction  whether a clip bound held
    mismatch       |log trainer - log engine|, the trainer's being Tokens.old
    bit_equal      whether the two are the same float
    rho            trainer / engine; with rho_squared for `raytron.rl.statistics.effective_share`
    entropy        of the whole distribution where the trainer computed it, else its one-sample estimate -log p
and where they apply:
    corrected      whether rho was out of the correction's bounds
    reference_kl   k3 estimate of KL(current || reference)"""


class Algorithm:
    """A policy-gradient algorithm as configured, and with every number given: `config`.

    needs_critic: wants `Batch.fields["values"]`, and has a `value_loss`. needs_reference, needs_old: wants the fields
    "reference", "old". Where "old" is not wanted, `Tokens.old` is the current log-probabilities, detached. entropy:
    wants `Tokens.entropy` with a gradient. metrics: the names of what `loss` reports, in this order.

    A member states its own numbers in `defaults`, and in `unused` the common ones it has no use for. Raises ValueError
    for a configuration that would not mean what it says.
    """

    defaults: ClassVar[AlgorithmConfig] = AlgorithmConfig()
    unused: ClassVar[tuple[str, ...]] = ()
    needs_critic: ClassVar[bool] = False

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = c = resolved(config, self.defaults, self.unused)
        self.needs_reference = c.kl != "none"
        self.needs_old = c.decoupled and c.epochs * c.minibatches > 1
        self.entropy = c.entropy_coefficient > 0
        more = {"corrected": c.correction != "none", "reference_kl": self.needs_reference}
        self.metrics = METRICS + tuple(name for name, applies in more.items() if applies)

    def keep(self, group: Group) -> bool:
        """Whether to train on a group. Dynamic sampling (Yu et al. 2025) wants rewards that differ, before shaping."""
        return varies(group.rewards) if self.config.dynamic_sampling else True

    def prepare(self, batch: Batch) -> Batch:
        """The batch with "advantages", "weights" and what else the losses read. ValueError for rewards not finite."""
        if not np.isfinite(batch.rewards).all():
            worst = batch.groups[~np.isfinite(batch.rewards)][0]
            raise ValueError(f"a reward of group {worst} is not finite; a verifier that cannot judge must return None")
        return self.weigh(batch.having(**self.fields(batch, self.shaped(batch), self.charge(batch))))

    def updates(self, batch: Batch) -> list[Batch]:
        """A prepared batch as what the optimizer's updates are made of, in order, each weighed by its own counts."""
        parts = np.array_split(np.arange(len(batch)), self.config.minibatches)
        return [self.weigh(batch.select(rows)) for rows in parts if len(rows)] * self.config.epochs

    def weigh(self, batch: Batch) -> Batch:
        """With the field "weights" of its reduction; overlong filtering takes them from truncated trajectories."""
        weights_T = reduction_weights(batch, self.config.reduction, self.config.constant_length)
        if self.config.overlong_filtering:
            weights_T = np.where(batch.truncated[batch.rows], 0.0, weights_T)
        return batch.having(weights=weights_T)

    def shaped(self, batch: Batch) -> np.ndarray:
        """Rewards with the overlong charge, float64 [N]."""
        c = self.config
        if not c.overlong_buffer:
            return batch.rewards
        charges_N = overlong_charge(batch.response_lengths, c.constant_length, c.overlong_buffer, c.overlong_penalty)
        return batch.rewards + charges_N

    def charge(self, batch: Batch) -> np.ndarray:
        """What each chosen token is charged for leaving the reference (k1), float64 [T]; 0 unless kl is "reward"."""
        charge_T, at = np.zeros(len(batch.tokens)), batch.chosen
        if self.config.kl == "reward":
            logprobs_T, reference_T = batch.fields.get("old", batch.logprobs), batch.fields["reference"]
            charge_T[at] = self.config.kl_coefficient * k1(logprobs_T[at].astype(np.float64), reference_T[at])
        return charge_T

    def fields(self, batch: Batch, rewards_N: np.ndarray, charge_T: np.ndarray) -> dict[str, np.ndarray]:
        """What `prepare` adds, [T] each. Here every chosen token has its trajectory's advantage, charges included."""
        total_N = rewards_N - np.add.reduceat(charge_T, batch.starts[:-1])
        return {"advantages": np.where(batch.chosen, self.advantages(total_N, batch.groups)[batch.rows], 0.0)}

    def advantages(self, rewards_N: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
        """Of each trajectory, float64 [N]."""
        return group_advantages(rewards_N, groups_N, self.config.normalize_std)

    def loss(self, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each token, neither weighted nor masked, and its metrics, detached; [T] each.

        Tokens outside the mask have no part in any other's numbers.
        """
        tokens, c = _without_masked(tokens), self.config
        anchor_T = tokens.old if c.decoupled else tokens.behaviour
        log_ratio_T = tokens.logprobs - anchor_T
        ratio_T = self.ratio(log_ratio_T, tokens)
        loss_T, clipped_T = self.surrogate(ratio_T, tokens)
        metrics = {"kl": k3(anchor_T, tokens.logprobs), "ratio": ratio_T, "clip_fraction": clipped_T}
        metrics |= _engine_metrics(tokens)
        if c.correction != "none":
            log_rho_T, bounds = tokens.old - tokens.behaviour, (c.correction_low, c.correction_high)
            weights_T, metrics["corrected"] = CORRECTIONS[c.correction].weights(log_rho_T, tokens, *bounds)
            loss_T = weights_T * loss_T
        if c.kl == "loss":
            kl_T = kl_loss(c.kl_estimator, tokens.logprobs, tokens.reference, tokens.behaviour)
            loss_T = loss_T + c.kl_coefficient * kl_T
        if self.entropy:
            loss_T = loss_T - c.entropy_coefficient * tokens.entropy
        if self.needs_reference:
            metrics["reference_kl"] = k3(tokens.logprobs, tokens.reference)
        return loss_T, {name: metrics[name].detach().to(loss_T.dtype) for name in self.metrics}

    def ratio(self, log_ratio_T: Tensor, tokens: Tokens) -> Tensor:
        """Current probability over the anchor's, with gradient."""
        return bounded_exp(log_ratio_T)

    def surrogate(self, ratio_T: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The policy's loss, and where a bound held (bool)."""
        c = self.config
        return clipped_surrogate(ratio_T, tokens.advantages, c.clip_low, c.clip_high, c.dual_clip)

    def value_loss(self, values_T: Tensor, tokens: Tokens) -> Tensor:
        """The critic's loss of each token. Only where `needs_critic`."""
        raise NotImplementedError(f"{self.config.name} has no critic")


def _without_masked(tokens: Tokens) -> Tokens:
    """Zeros wherever the policy chose nothing: what was there can be neither overflow nor part of a sum."""
    chosen_T = tokens.mask > 0
    names = ("logprobs", "behaviour", "advantages", "old", "reference", "entropy")
    given = {name: getattr(tokens, name) for name in names if getattr(tokens, name) is not None}
    return replace(tokens, **{name: torch.where(chosen_T, x_T, 0.0) for name, x_T in given.items()})


def _engine_metrics(tokens: Tokens) -> dict[str, Tensor]:
    """Of trainer against engine, and the entropy."""
    log_rho_T = tokens.old - tokens.behaviour
    rho_T = bounded_exp(log_rho_T)
    entropy_T = -tokens.logprobs if tokens.entropy is None else tokens.entropy
    return {
        "mismatch": log_rho_T.abs(),
        "bit_equal": log_rho_T == 0,
        "rho": rho_T,
        "rho_squared": rho_T.square(),
        "entropy": entropy_T,
    }

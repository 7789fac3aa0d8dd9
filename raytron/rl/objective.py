"""What reinforcement learning makes of a model's output: log-probabilities or values, and the algorithm's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from raytron.data.loader import MicroBatch
from raytron.parallel.collectives import Axis
from raytron.parallel.tensor import vocab_parallel_cross_entropy, vocab_parallel_entropy
from raytron.rl.algorithms import Algorithm
from raytron.rl.types import Tokens

__all__ = ["PolicyObjective", "ValueObjective", "token_logprobs"]


def token_logprobs(logits_TVt: Tensor, batch: MicroBatch, start: int, tp: Axis, temperature: float) -> Tensor:
    """Log-probabilities [T] of a micro-batch's labels under softmax(logits / temperature), fp32 (fp64 stays)."""
    scaled = logits_TVt if temperature == 1.0 else logits_TVt / temperature
    return -vocab_parallel_cross_entropy(scaled, batch.labels_BS.reshape(-1), start, tp)


class PolicyObjective:
    """An algorithm's loss as `TrainEngine` takes it: the sum of weight x loss over the chosen tokens.

    temperature: of the sampling: the policy that is trained is the one that was sampled from.

    `sums` are those of the algorithm's metrics over the chosen tokens.
    """

    normalized = True

    def __init__(self, algorithm: Algorithm, temperature: float = 1.0) -> None:
        self.algorithm, self.temperature = algorithm, temperature
        self.sums = algorithm.metrics

    def __call__(self, logits_TVt: Tensor, batch: MicroBatch, start: int, tp: Axis) -> tuple[Tensor, Tensor]:
        """See `raytron.training.losses.Objective`."""
        tokens = self._tokens(logits_TVt, batch, start, tp)
        loss_T, metrics = self.algorithm.loss(tokens)
        counted = tokens.mask > 0
        weights = batch.fields_BS["weights"].reshape(-1)
        # What is not counted may be infinite, and 0 x inf is not 0.
        loss = (torch.where(counted, loss_T, 0.0) * weights).sum()
        with torch.no_grad():
            columns = torch.stack([metrics[name] for name in self.sums])
            sums = torch.where(counted, columns, 0.0).double().sum(1)
        return loss, sums

    def _tokens(self, logits_TVt: Tensor, batch: MicroBatch, start: int, tp: Axis) -> Tokens:
        fields = {name: values.reshape(-1) for name, values in batch.fields_BS.items()}
        logprobs = token_logprobs(logits_TVt, batch, start, tp, self.temperature)
        scaled = logits_TVt if self.temperature == 1.0 else logits_TVt / self.temperature
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.algorithm.entropy):
            entropy = vocab_parallel_entropy(scaled, tp)
        return Tokens(
            logprobs=logprobs,
            mask=batch.loss_mask_BS.reshape(-1),
            sequence=fields["sequence"],
            sequences=fields["sequences"].numel(),
            behaviour=fields["behaviour"],
            advantages=fields["advantages"],
            old=fields.get("old", logprobs.detach()),  # one update a batch: these are the weights it began with
            reference=fields.get("reference"),
            entropy=entropy,
            extra=fields,
        )


class ValueObjective:
    """An algorithm's loss of its critic, whose model scores every token.

    `sums`: "value_error", |estimate - return| over the chosen tokens, and "value", the estimates.
    """

    normalized = True
    sums = ("value_error", "value")

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm

    def __call__(self, logits_TVt: Tensor, batch: MicroBatch, start: int, tp: Axis) -> tuple[Tensor, Tensor]:
        """See `raytron.training.losses.Objective`; `logits_TVt` are scores [T, 1]."""
        fields = {name: numbers.reshape(-1) for name, numbers in batch.fields_BS.items()}
        values_T, mask_T = logits_TVt[:, 0], batch.loss_mask_BS.reshape(-1)
        values_T = values_T if values_T.dtype == torch.float64 else values_T.float()
        tokens = Tokens(
            logprobs=values_T.detach(),
            mask=mask_T,
            sequence=fields["sequence"],
            sequences=fields["sequences"].numel(),
            behaviour=fields["behaviour"],
            advantages=fields["advantages"],
            old=fields["behaviour"],
            extra=fields,
        )
        loss = (torch.where(mask_T > 0, self.algorithm.value_loss(values_T, tokens), 0.0) * fields["weights"]).sum()
        known = torch.stack(((values_T - fields["returns"]).abs(), values_T)).detach()
        return loss, torch.where(mask_T > 0, known, 0.0).double().sum(1)

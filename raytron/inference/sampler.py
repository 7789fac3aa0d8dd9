"""Tokens from logits, for a whole batch at once.

Chance comes as one number in [0, 1) per token, a hash of (the request's seed, how many tokens the sequence has), and
picks the token at which the cumulative probability passes it. So a sequence's tokens depend on its own logits and seed
only, never on what it was computed with, and a preempted sequence goes on as if nothing had been.

Legend: B sequences of the step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raytron.inference.types import SamplingParams

__all__ = ["Draw", "History", "Picked", "pick", "uniform"]


@dataclass(slots=True)
class Draw:
    """One sequence's part of a draw.

    slot: its row in `History`. position: tokens of its output so far. forbidden: ids it may not end with yet.
    """

    params: SamplingParams
    seed: int
    slot: int
    position: int
    forbidden: Sequence[int] = ()


@dataclass(frozen=True)
class Picked:
    """tokens, logprobs: one for each sequence. top: id -> log-probability of the likeliest, where asked for."""

    tokens: list[int]
    logprobs: list[float]
    top: list[dict[int, float] | None]


def pick(
    logits_BV: Tensor,
    draws: Sequence[Draw],
    history: History,
    allowed: Tensor | None = None,
    processed: bool = False,
) -> Picked:
    """Choose a token for every row.

    Args:
        logits_BV: of the model, any float dtype.
        allowed: bool [B, V], what a constraint permits.
        processed: log-probabilities are of the distribution that tokens are drawn from (that of a greedy row, which has
            none, of temperature 1 without filters), else of the model's own, which penalties, bias, constraints,
            temperature and filters leave alone.
    """
    logits = logits_BV.float()
    logs = None if processed else torch.log_softmax(logits, -1)
    plain = [_plain(draw) for draw in draws]
    if all(plain) and allowed is None:
        tokens = logits.argmax(-1)
        logs = torch.log_softmax(logits, -1) if logs is None else logs
    else:
        guided = _guided(logits, draws, history, allowed)
        tokens, logs = _choose(guided, draws, logs)
    chosen = logs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return Picked(tokens.tolist(), chosen.tolist(), _top(logs, [draw.params.logprobs for draw in draws]))


def _plain(draw: Draw) -> bool:
    """Whether the likeliest token as the model has it is the answer."""
    p = draw.params
    return (
        p.temperature == 0.0
        and p.repetition_penalty == 1.0
        and p.presence_penalty == p.frequency_penalty == 0.0
        and not p.logit_bias
        and not draw.forbidden
    )


def _top(logs_BV: Tensor, wanted: Sequence[int | None]) -> list[dict[int, float] | None]:
    most = max((n for n in wanted if n is not None), default=0)
    if not most:
        return [None if n is None else {} for n in wanted]
    values, ids = (x.tolist() for x in logs_BV.topk(min(most, logs_BV.shape[1])))
    return [
        None if n is None else dict(zip(i[:n], v[:n], strict=True)) for n, i, v in zip(wanted, ids, values, strict=True)
    ]


def top_logprobs(logs_TV: Tensor, count: int) -> list[dict[int, float]]:
    """The `count` likeliest of every row: id -> log-probability."""
    return _top(logs_TV, [count] * logs_TV.shape[0])


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _guided(logits: Tensor, draws: Sequence[Draw], history: History, allowed: Tensor | None) -> Tensor:
    """Logits after penalties, bias and what is forbidden."""
    logits = logits.clone()
    params = [draw.params for draw in draws]
    history.penalise(logits, [draw.slot for draw in draws], params)
    rows, ids, values = [], [], []
    for row, draw in enumerate(draws):
        bias = draw.params.logit_bias
        rows += [row] * (len(bias) + len(draw.forbidden))
        ids += [*bias, *draw.forbidden]
        values += [*bias.values(), *[-torch.inf] * len(draw.forbidden)]
    if rows:
        where = torch.tensor((rows, ids), device=logits.device)
        logits.index_put_((where[0], where[1]), logits.new_tensor(values), accumulate=True)
    if allowed is not None:
        logits.masked_fill_(~allowed, -torch.inf)
    return logits


def _choose(logits: Tensor, draws: Sequence[Draw], logs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The likeliest of greedy rows, a draw of the others, int64 [B]; and `logs`, or those of what was drawn from.

    Rows that cut nothing off are drawn in the order of the vocabulary, without sorting it. Which way a row goes is its
    own affair: the same number picks another token in another order.
    """
    tokens, report = logits.argmax(-1), logs is None
    if report:
        logs = torch.log_softmax(logits, -1)
    chance = [row for row, draw in enumerate(draws) if draw.params.temperature > 0.0]
    whole = [row for row in chance if not _cuts(draws[row].params)]
    cut = [row for row in chance if _cuts(draws[row].params)]
    for rows, draw in ((whole, _draw), (cut, _draw_cut)):
        if rows:
            at = torch.tensor(rows, device=logits.device)
            mine = [draws[row] for row in rows]
            heat = _column([d.params.temperature for d in mine], logits)
            u = _column(uniform([d.seed for d in mine], [d.position for d in mine]), logits)
            tokens[at], drawn = draw(logits[at] / heat, u, [d.params for d in mine])
            if report:
                logs[at] = torch.log_softmax(drawn, -1)
    return tokens, logs


def _cuts(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _draw(logits: Tensor, u: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits they were drawn by."""
    return _invert(torch.softmax(logits, -1), u), logits


def _draw_cut(logits: Tensor, u: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """The same; top_k and min_p cut the distribution, top_p what they leave of it."""
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = torch.softmax(values, -1)
    rank = torch.arange(values.shape[1], device=values.device)
    keep = rank < _column([p.top_k if p.top_k > 0 else values.shape[1] for p in params], values)
    keep &= probabilities >= _column([p.min_p for p in params], values) * probabilities[:, :1]
    left = probabilities * keep
    before = left.cumsum(-1) - left
    keep &= before < _column([p.top_p for p in params], values) * left.sum(-1, keepdim=True)
    keep[:, 0] = True
    tokens = ids.gather(1, _invert(probabilities * keep, u).unsqueeze(1)).squeeze(1)
    return tokens, logits.scatter(1, ids, values.masked_fill(~keep, -torch.inf))


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """The first index at which the cumulative weight exceeds u times the whole: one of weight above zero."""
    total = weights.double().cumsum(-1)
    index = (total <= u.double() * total[:, -1:]).sum(-1)
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).byte().argmax(-1)  # rounding must not pick past the end
    return torch.minimum(index, last)


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> list[float]:
    """A number in [0, 1) for each (seed, position), 24 bits: SplitMix64 (Steele et al. 2014) of the two."""
    seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
    x = _mix(seed) ^ np.array(positions, dtype=np.uint64)
    return ((_mix(x) >> np.uint64(40)).astype(np.float64) * 2.0**-24).tolist()


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class History:
    """What each running sequence has said, for penalties: kept only for those that ask, a row a slot.

    counts: int32 [slots, V], how often a token stands in the output; seen: bool, in prompt or output.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._shape, self._device = (slots, vocab_size), device
        self._counts: Tensor | None = None
        self._seen: Tensor | None = None
        self._owner: list[object] = [None] * slots

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        """Whether a request has penalties."""
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0

    def holds(self, slot: int, owner: object) -> bool:
        """Whether the slot's row is this sequence's."""
        return self._owner[slot] is owner

    def begin(self, slot: int, owner: object, prompt: Sequence[int], output: Sequence[int]) -> None:
        """A sequence takes a slot."""
        self._owner[slot] = owner
        if self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        self._counts[slot] = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=self._shape[1]).to(
            self._counts
        )
        self._seen[slot] = self._counts[slot] > 0
        self._seen[slot, torch.tensor(prompt, dtype=torch.int64, device=self._device)] = True

    def extend(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Sequences said one more token each."""
        if slots:
            where = torch.tensor((slots, tokens), device=self._device)
            self._counts[where[0], where[1]] += 1
            self._seen[where[0], where[1]] = True

    def penalise(self, logits: Tensor, slots: Sequence[int], params: Sequence[SamplingParams]) -> None:
        """Apply the penalties of the rows that have any, in place."""
        rows = [row for row, p in enumerate(params) if self.needed(p)]
        if not rows:
            return
        mine = [params[row] for row in rows]
        at, slot = (torch.tensor(x, device=logits.device) for x in (rows, [slots[row] for row in rows]))
        counts, seen, values = self._counts[slot], self._seen[slot], logits[at]
        repetition = _column([p.repetition_penalty for p in mine], logits)
        values = torch.where(seen, torch.where(values > 0, values / repetition, values * repetition), values)
        values -= _column([p.frequency_penalty for p in mine], logits) * counts
        values -= _column([p.presence_penalty for p in mine], logits) * (counts > 0)
        logits[at] = values

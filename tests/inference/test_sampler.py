"""Sampling: distributions, independence of the batch, and each knob against what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.inference.sampler import Draw, History, pick, uniform
from raytron.inference.types import SamplingParams

V = 50


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2


def history(slots: int = 8) -> History:
    return History(slots, V, torch.device("cpu"))


def frequencies(params: SamplingParams, row: torch.Tensor, count: int = 4000) -> torch.Tensor:
    """How often each token comes, over seeds."""
    draws = [Draw(params, seed, 0, 0) for seed in range(count)]
    tokens = pick(row.expand(count, -1), draws, history()).tokens
    return torch.bincount(torch.tensor(tokens), minlength=V) / count


def test_numbers_are_uniform_and_a_function_of_seed_and_position():
    numbers = np.array(uniform(list(range(5000)), [3] * 5000))
    assert 0 <= numbers.min() < numbers.max() < 1
    assert np.abs(np.histogram(numbers, 10, (0, 1))[0] / 5000 - 0.1).max() < 0.02
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.05
    along = np.array(uniform([7] * 5000, list(range(5000))))
    assert np.abs(np.histogram(along, 10, (0, 1))[0] / 5000 - 0.1).max() < 0.02
    assert uniform([7, 8], [1, 2]) == uniform([7], [1]) + uniform([8], [2])
    assert uniform([-1], [0]) != uniform([0], [0])


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(temperature=0.7), lambda p, order: order),
        (SamplingParams(temperature=1.0, top_k=5), lambda p, order: order[:5]),
        (SamplingParams(temperature=1.0, min_p=0.2), lambda p, order: order[p[order] >= 0.2 * p.max()]),
        (
            SamplingParams(temperature=1.0, top_p=0.6),
            lambda p, order: order[p[order].cumsum(0) - p[order] < 0.6],
        ),
    ],
    ids=["temperature", "top_k", "min_p", "top_p"],
)
def test_tokens_come_as_often_as_they_are_likely(params, kept):
    (row,) = logits(1, seed=3)
    p = torch.softmax(row.double() / params.temperature, -1)
    keep = kept(p, p.argsort(descending=True))
    wanted = torch.zeros(V, dtype=torch.float64)
    wanted[keep] = p[keep] / p[keep].sum()
    found = frequencies(params, row)
    assert (found[wanted == 0] == 0).all()
    assert (found - wanted).abs().max() < 0.03


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_a_row_does_not_depend_on_the_others(data):
    rows = data.draw(st.integers(1, 6))
    one = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.5, 1.0]),
        top_k=st.sampled_from([0, 1, 3, 40]),
        top_p=st.sampled_from([0.3, 0.9, 1.0]),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        logit_bias=st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, 2.0]), max_size=3),
        logprobs=st.sampled_from([None, 0, 3]),
    )
    params = [data.draw(one) for _ in range(rows)]
    past = [data.draw(st.lists(st.integers(0, V - 1), max_size=5)) for _ in range(rows)]
    x, memory = logits(rows, seed=rows), history()
    for slot in range(rows):
        memory.begin(slot, slot, past[slot], past[slot][:2])
    draws = [Draw(p, 11 * slot, slot, len(past[slot]), (4,)) for slot, p in enumerate(params)]
    processed = data.draw(st.booleans())
    together = pick(x, draws, memory, None, processed)
    assert together.tokens == pick(x, draws, memory, None, not processed).tokens
    for row in range(rows):
        alone = pick(x[row : row + 1], draws[row : row + 1], memory, None, processed)
        assert (alone.tokens[0], alone.logprobs[0], alone.top[0]) == (
            together.tokens[row], together.logprobs[row], together.top[row],
        )  # fmt: skip
        assert together.tokens[row] != 4
        if not processed:
            assert together.logprobs[row] == torch.log_softmax(x[row], -1)[together.tokens[row]]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
def test_processed_log_probabilities_are_those_at_the_temperature(temperature: float):
    """To the bit what a trainer computes that divides fp32 logits; a greedy row has no distribution but the model's."""
    x = logits(6, seed=8)
    draws = [Draw(SamplingParams(temperature=temperature), seed, seed, 0) for seed in range(6)]
    picked = pick(x, draws, history(), None, processed=True)
    wanted = torch.log_softmax(x / (temperature or 1.0), -1)
    assert picked.logprobs == wanted[torch.arange(6), picked.tokens].tolist()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, top_k=5, logprobs=20),
        SamplingParams(temperature=1.0, top_p=0.7, min_p=0.01, logprobs=20),
        SamplingParams(temperature=1.3, top_k=9, logit_bias={3: 5.0, 4: -100.0}, presence_penalty=1.0, logprobs=20),
    ],
)
def test_processed_log_probabilities_are_of_what_tokens_are_drawn_from(params):
    (row,), memory = logits(1, seed=9), history()
    memory.begin(0, "it", [1], [2])
    draws = [Draw(params, seed, 0, 0) for seed in range(4000)]
    picked = pick(row.expand(4000, -1), draws, memory, None, processed=True)
    found = torch.bincount(torch.tensor(picked.tokens), minlength=V) / 4000
    wanted = {token: np.exp(logprob) for token, logprob in picked.top[0].items()}
    assert sum(wanted.values()) == pytest.approx(1.0, abs=1e-5)  # 20 alternatives are more than are left
    assert all(abs(found[token] - p) < 0.03 for token, p in wanted.items())
    assert all(wanted[token] == np.exp(logprob) for token, logprob in zip(picked.tokens, picked.logprobs, strict=True))


def test_penalties_are_what_their_names_say():
    (row,), memory = logits(1, seed=5), history()
    params = SamplingParams(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.4)
    prompt, output = [1, 2, 3], [3, 4, 4]
    memory.begin(0, "it", prompt, output[:1])
    for token in output[1:]:
        memory.extend([0], [token])
    wanted = row.clone()
    for token in {*prompt, *output}:
        wanted[token] = wanted[token] / 1.5 if wanted[token] > 0 else wanted[token] * 1.5
    for token in set(output):
        wanted[token] -= 0.3 + 0.4 * output.count(token)
    guided = row.unsqueeze(0).clone()
    memory.penalise(guided, [0], [params])
    torch.testing.assert_close(guided[0], wanted)


def test_a_bias_forces_and_forbids_and_a_mask_has_the_last_word():
    x = logits(2, seed=6)
    best = x.argmax(-1).tolist()
    draws = [
        Draw(SamplingParams(temperature=0.0, logit_bias={best[0]: -100.0}), 0, 0, 0),
        Draw(SamplingParams(temperature=1.0, logit_bias={9: 100.0}), 0, 1, 0),
    ]
    tokens = pick(x, draws, history()).tokens
    assert tokens[0] == x[0].topk(2).indices[1]
    assert tokens[1] == 9
    only = torch.zeros(2, V, dtype=torch.bool)
    only[:, 17] = True
    assert pick(x, draws, history(), only).tokens == [17, 17]


def test_alternatives_are_the_likeliest():
    x = logits(3, seed=7)
    draws = [Draw(SamplingParams(temperature=0.0, logprobs=n), 0, 0, 0) for n in (2, None, 0)]
    top = pick(x, draws, history()).top
    logs = torch.log_softmax(x, -1)
    assert list(top[0]) == logs[0].topk(2).indices.tolist()
    assert list(top[0].values()) == logs[0].topk(2).values.tolist()
    assert top[1] is None
    assert top[2] == {}

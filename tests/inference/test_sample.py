"""The plain sampler: what it picks, when it stops, and that every tp rank picks the same."""

from __future__ import annotations

import pytest
import torch

from raytron.inference import sample
from raytron.models import build
from raytron.models.arch import DecoderConfig
from raytron.parallel.mesh import Mesh

ARCH = DecoderConfig(
    vocab_size=37, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16, initializer_range=0.4,
)  # fmt: skip
PROMPT = [3, 1, 4]


@pytest.fixture(scope="module")
def model():
    return build(ARCH, dtype=torch.float64, seed=2)


def greedy(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens[-ARCH.max_position_embeddings :]]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_temperature_zero_takes_the_likeliest_and_so_does_a_choice_of_one(model):
    wanted = greedy(model, PROMPT, 8)
    assert sample(model, PROMPT, 8, temperature=0) == wanted
    assert sample(model, PROMPT, 8, temperature=2.0, top_k=1, seed=9) == wanted


def test_it_goes_on_beyond_the_longest_sequence_and_keeps_no_gradient(model):
    assert sample(model, PROMPT, 30, temperature=0) == greedy(model, PROMPT, 30)
    assert all(param.grad is None for param in model.parameters())


def test_draws_follow_the_seed_and_only_the_seed(model):
    texts = [tuple(sample(model, PROMPT, 10, temperature=1.5, seed=seed)) for seed in range(8)]
    torch.manual_seed(1)
    assert texts == [tuple(sample(model, PROMPT, 10, temperature=1.5, seed=seed)) for seed in range(8)]
    assert len(set(texts)) > 4


def test_draws_follow_the_probabilities_of_the_likeliest(model):
    logits = model(torch.tensor([PROMPT]))[0, -1]
    top, ids = logits.topk(4)
    wanted = dict(zip(ids.tolist(), (top / 0.7).softmax(-1).tolist(), strict=True))
    drawn = [sample(model, PROMPT, 1, temperature=0.7, top_k=4, seed=seed)[0] for seed in range(600)]
    assert set(drawn) <= wanted.keys()
    for token, probability in wanted.items():
        deviation = (probability * (1 - probability) / 600) ** 0.5
        assert abs(drawn.count(token) / 600 - probability) < 5 * deviation + 1e-9


def test_it_ends_before_the_stop_token(model):
    text = sample(model, PROMPT, 8, temperature=0)
    stop = text[3]
    assert sample(model, PROMPT, 8, temperature=0, stop=stop) == text[: text.index(stop)]
    assert sample(model, PROMPT, 0) == []


def run_sample(world) -> list[int]:
    return sample(build(ARCH, world, dtype=torch.float64, seed=2), PROMPT, 12, temperature=1.0, seed=5)


def test_every_rank_of_a_cut_model_draws_the_same(ranks, model):
    wanted = sample(model, PROMPT, 12, temperature=1.0, seed=5)
    assert ranks.run(run_sample, Mesh(tp=4)) == [wanted] * 4

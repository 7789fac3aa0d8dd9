"""Models that score tokens: `transformers`' sequence classifiers, at any layout, and policies turned into critics."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from raytron.checkpoint import save_pretrained
from raytron.models import build, from_pretrained, read_arch
from raytron.models.arch import DecoderConfig
from raytron.models.loading import load_weights
from raytron.parallel.mesh import Mesh

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(3)
    config = LlamaConfig(**SIZES, num_labels=3, pad_token_id=0, tie_word_embeddings=True, attn_implementation="eager")
    model = LlamaForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.score.weight)
    folder = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(folder)
    return folder, model


def score(world, folder, tokens):
    return from_pretrained(folder, world)(tokens).detach()


@pytest.mark.parametrize("tp", [1, 2])
def test_scores_equal_transformers_at_the_last_token(classifier, ranks, tp):
    folder, theirs = classifier
    tokens = torch.randint(1, 61, (3, 10))
    with torch.no_grad():
        wanted = theirs(tokens).logits
    for found in ranks.run(score, Mesh(tp=tp), folder, tokens):
        assert found.shape == (3, 10, 3)
        torch.testing.assert_close(found[:, -1], wanted, atol=1e-5, rtol=1e-5)


def test_transformers_reads_what_is_saved(classifier, tmp_path):
    folder, theirs = classifier
    assert read_arch(folder).num_labels == 3
    save_pretrained(from_pretrained(folder), tmp_path)
    again = LlamaForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == 3
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_policy_becomes_a_critic_that_knows_nothing_yet(tmp_path):
    arch = DecoderConfig(**SIZES, tie_word_embeddings=True)
    policy = build(arch, seed=1)
    save_pretrained(policy, tmp_path)
    critic = build(arch.replace(num_labels=1), seed=2)
    with pytest.raises(ValueError, match=r"score\.weight"):
        load_weights(critic, tmp_path)
    load_weights(critic, tmp_path, leave=["score.weight"])
    assert not critic(torch.randint(0, 61, (1, 5))).any()
    assert torch.equal(critic.chunks[0].embed.weight, policy.chunks[0].embed.weight)

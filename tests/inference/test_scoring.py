"""Scores of whole sequences are those of transformers' classifier, whatever they are computed beside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaForSequenceClassification

from raytron.checkpoint import save_pretrained
from raytron.inference import Scorer
from raytron.models import build
from raytron.models.arch import DecoderConfig
from tests.inference.classifiers import random_classifier, scores_of, sequences


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> tuple[Path, LlamaForSequenceClassification]:
    return random_classifier(tmp_path_factory.mktemp("classifier"), labels=2)


@pytest.mark.parametrize("most", [1, 40, 10_000])
def test_scores_are_those_of_transformers_in_any_batches(classifier, most):
    folder, theirs = classifier
    asked = sequences(17)
    found = Scorer(None, folder, max_batch_tokens=most).score(asked)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, scores_of(theirs, asked), atol=1e-5, rtol=1e-5)


def test_in_reproducible_mode_the_neighbours_change_no_bit(classifier):
    asked = sequences(17)
    scorer = Scorer(None, classifier[0], reproducible=True)
    alone = np.concatenate([scorer.score([tokens]) for tokens in asked])
    assert (scorer.score(asked) == alone).all()


@pytest.mark.parametrize(
    ("tokens", "message"), [([], "0 tokens"), ([1] * 65, "65 tokens"), ([61], "vocabulary"), ([-1], "vocabulary")]
)
def test_what_cannot_be_scored_is_refused(classifier, tokens, message):
    with pytest.raises(ValueError, match=message):
        Scorer(None, classifier[0]).score([[1, 2], tokens])


def test_a_language_model_is_no_scorer(tmp_path):
    arch = DecoderConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    save_pretrained(build(arch, seed=0), tmp_path)
    with pytest.raises(ValueError, match="a language model"):
        Scorer(None, tmp_path)

"""A reward model: a sequence classifier that scores the whole of prompt and answer. Where it runs is not told here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from raytron.data import load_tokenizer
from raytron.data.chat import ChatTemplate
from raytron.inference.scoring import check_tokens
from raytron.rl.environments.base import Generated, Prompt

__all__ = ["ModelReward", "Read", "chosen_label", "reader"]

Read = Callable[[Prompt, Generated], Sequence[int]]
"""What a reward model is given of an answer: token ids."""


class ModelReward:
    """The score that a sequence classifier gives.

    Args:
        score: of token ids, its scores [num_labels]: `ScorerGroup.score`, or a `Scorer` of one's own.
        arch: the classifier's architecture (`raytron.models.read_arch`).
        read: what it is given; see `reader`.
        label: which of its scores is the reward; see `chosen_label`.

    A call raises ValueError for tokens that the model cannot take, and what `score` raises.
    """

    concurrency = 1 << 20  # they are computed together

    def __init__(
        self, score: Callable[[Sequence[int]], Awaitable[np.ndarray]], arch: Any, read: Read, label: int = 0
    ) -> None:
        self._score, self._arch, self._read, self._label = score, arch, read, label

    async def __call__(self, prompt: Prompt, answer: Generated) -> float:
        tokens = self._read(prompt, answer)
        check_tokens(self._arch, tokens)
        return float((await self._score(tokens))[self._label])


def chosen_label(path: str, arch: Any, label: int | None) -> int:
    """Which score counts: of a model that gives one, that. ValueError for a language model, or a label not stated."""
    if not arch.num_labels:
        raise ValueError(f"{path} is a language model; a reward model is a ...ForSequenceClassification")
    if (label is None and arch.num_labels > 1) or not 0 <= (label or 0) < arch.num_labels:
        raise ValueError(
            f"the reward model {path} gives {arch.num_labels} scores; say which one counts: reward.model.label 0 to "
            f"{arch.num_labels - 1}"
        )
    return label or 0


def reader(path: str, template: str | None) -> Read:
    """What the model in a Hugging Face directory reads of an answer.

    template: None gives it the policy's tokens as they are; "chat" puts question and answer into its own chat template;
    any other text is filled in ({prompt}, {response}) and, like a chat, cut into tokens by its own tokenizer.

    Raises ValueError for a template without {response}, or a directory without the tokenizer or template asked for.
    """
    if template is None:
        return lambda prompt, answer: (*prompt.token_ids, *answer.token_ids)
    tokenizer = load_tokenizer(path)
    if template == "chat":
        chat = ChatTemplate(path)
        if not chat.given:
            raise ValueError(f"{path} has no chat template; write reward.model.template out, with {{prompt}} in it")
        return lambda prompt, answer: tokenizer.encode(_chat(chat, prompt.asked, answer.text or ""))
    if "{response}" not in template:
        raise ValueError(f"reward.model.template {template!r} has no {{response}}, so no answer would be read")
    return lambda prompt, answer: tokenizer.encode(template.format(prompt=prompt.asked, response=answer.text))


def _chat(chat: ChatTemplate, question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return chat.render(messages, add_generation_prompt=False).prompt

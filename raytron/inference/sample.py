"""The plain sampler: the whole forward for every token. For a look at a model in training, not for serving."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raytron.models.base import ShardedModel

__all__ = ["sample"]


@torch.no_grad()
def sample(
    model: ShardedModel,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    stop: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Continue `prompt` (token ids, at least one) by up to `max_tokens`; ends before `stop`. Returns the new ids.

    temperature 0 takes the likeliest token; otherwise the `top_k` likeliest are drawn from, reproducibly for a seed.
    The model is one that is not cut over pp.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    longest = model.arch.max_position_embeddings
    for _ in range(max_tokens):
        logits = model(torch.tensor([tokens[-longest:]], device=model.weights.device))[0, -1].float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            top, ids = logits.topk(min(top_k, len(logits)))
            token = int(ids[torch.multinomial((top / temperature).softmax(-1), 1, generator=generator)])
        if token == stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]

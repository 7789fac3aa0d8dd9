"""How OpenAI writes what an engine gave: log-probabilities, weight versions, and chunks of a stream."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raytron.inference import Completion, Output
from raytron.serving.answers import Numbered
from raytron.serving.metrics import Timer
from raytron.serving.text import Text

__all__ = ["Chunks", "chat_logprobs", "completion_logprobs", "finite", "joined", "version_spans"]

LOWEST = -9999.0  # JSON knows no infinity


def finite(logprob: float) -> float:
    """A log-probability JSON can hold: impossible tokens get -9999."""
    return max(logprob, LOWEST) if logprob == logprob else LOWEST


def joined(outputs: Numbered) -> Iterable[tuple[int, Output | Completion]]:
    """Outputs of one moment with those of a sequence put together, as (prompt number, output or completion)."""
    if len(outputs) == 1:
        return outputs
    sequences: dict[tuple[int, int], Output | Completion] = {}
    for number, output in outputs:
        before = sequences.get((number, output.index))
        sequences[number, output.index] = output if before is None else _together(before, output)
    return [(number, some) for (number, _), some in sequences.items()]


def _together(before: Output | Completion, output: Output) -> Completion:
    if isinstance(before, Output):
        before = _grown(Completion(before.index), before)
    return _grown(before, output)


def _grown(completion: Completion, output: Output) -> Completion:
    completion.text += output.text
    completion.token_ids += output.token_ids
    completion.logprobs += output.logprobs
    completion.versions += output.versions
    completion.top_logprobs += output.top_logprobs or ()
    completion.finish_reason, completion.stop_reason = output.finish_reason, output.stop_reason
    return completion


def completion_logprobs(
    text: Text,
    ids: Sequence[int],
    logprobs: Sequence[float | None],
    tops: Sequence[Mapping[int, float] | None],
    offset: int = 0,
) -> dict[str, Any]:
    """Of tokens, as /v1/completions writes them; `offset` is where in the text the first begins."""
    tokens = [text.token_text(token) for token in ids]
    ends = list(itertools.accumulate(map(len, tokens), initial=offset))
    own = zip(tokens, logprobs, itertools.chain(tops, itertools.repeat({})), strict=False)
    return {
        "tokens": tokens,
        "token_logprobs": [None if logprob is None else finite(logprob) for logprob in logprobs],
        "top_logprobs": [
            None if top is None or own_p is None else _named(text, top) | {token: finite(own_p)}
            for token, own_p, top in own
        ],
        "text_offset": ends[:-1],
    }


def _named(text: Text, top: Mapping[int, float]) -> dict[str, float]:
    return {text.token_text(token): finite(logprob) for token, logprob in top.items()}


def chat_logprobs(text: Text, part: Output | Completion) -> dict[str, Any]:
    """Of a part of an answer, as /v1/chat/completions writes them."""
    tops = part.top_logprobs or ({},) * len(part.token_ids)
    rows = zip(part.token_ids, part.logprobs, tops, strict=True)
    content = [
        {**_token(text, token, logprob), "top_logprobs": [_token(text, *pair) for pair in top.items()]}
        for token, logprob, top in rows
    ]
    return {"content": content, "refusal": None}


def _token(text: Text, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": text.token_text(token),
        "logprob": finite(logprob),
        "bytes": list(text.token_bytes(token)),
    }


def version_spans(versions: Sequence[int]) -> list[dict[str, int]]:
    """How many tokens in a row each version of the weights gave."""
    return [{"version": version, "tokens": len(list(run))} for version, run in itertools.groupby(versions)]


class Chunks:
    """Chunks of one stream. What they have in common is encoded once; nearly all differ by one text only."""

    def __init__(self, common: Mapping[str, Any], before_text: str, after_text: str) -> None:
        head = json.dumps(common, separators=(",", ":"))[:-1]
        self._head = f'data: {head},"weight_version":'
        self._before, self._after = before_text, after_text

    def text(self, index: int, text: str, version: int, used: Timer | None = None) -> str:
        """The common case: more text of a choice, with the usage so far where it is `used`."""
        choice = f'{{"index":{index},{self._before}{json.dumps(text)}{self._after}'
        told = "" if used is None else _usage(used.prompt_tokens, used.generated_tokens, used.cached_tokens)
        return f'{self._head}{version},"choices":[{choice},"logprobs":null,"finish_reason":null}}]{told}}}\n\n'

    def any(self, choices: Sequence[Mapping[str, Any]], version: int, used: Timer | None = None) -> str:
        """Anything else."""
        spelt = json.dumps(choices, separators=(",", ":"))
        told = "" if used is None else _usage(used.prompt_tokens, used.generated_tokens, used.cached_tokens)
        return f'{self._head}{version},"choices":{spelt}{told}}}\n\n'


def _usage(prompt: int, generated: int, cached: int) -> str:
    """What `service.usage` says, as JSON: some clients want it in every chunk."""
    total = f'"prompt_tokens":{prompt},"completion_tokens":{generated},"total_tokens":{prompt + generated}'
    return f',"usage":{{{total},"prompt_tokens_details":{{"cached_tokens":{cached}}}}}'

"""A language model as the judge, behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import math
import random
import re
from typing import Any

import httpx

from raytron.rl.environments.base import Generated, Prompt
from raytron.rl.rewards.base import PerLoop

__all__ = ["JudgeError", "LLMJudge"]

TEMPLATE = """Grade the response to the task below.

[Task]
{prompt}

[Reference answer]
{answer}

[Response]
{response}

How good is the response, from 0 (useless) to 10 (as right as the reference)? Say briefly why, then end with a line
"Score: N"."""


class JudgeError(RuntimeError):
    """The judge could not be asked, or did not give a score."""


class LLMJudge:
    """The score that a model gives, as a share of the best: 0.0 to 1.0.

    Args:
        url: up to and including /v1.
        model: its name there.
        template: the question; {prompt}, {answer} (the reference) and {response} are filled in.
        pattern: its group 1 is the score; the last match in the judge's reply counts.
        best: the highest score; one outside 0 .. best is a JudgeError.
        api_key: sent as a bearer token.
        retries: further tries after a lost connection, 408, 409, 429 or 5xx, ever longer apart (from `wait_s`, or what
            Retry-After says).
        request: further fields of the request, such as {"temperature": 0.0}.
    """

    def __init__(
        self,
        url: str,
        model: str,
        template: str = TEMPLATE,
        pattern: str = r"[Ss]core[^\w-]*(-?\d+(?:\.\d+)?)",
        best: float = 10.0,
        api_key: str | None = None,
        retries: int = 4,
        wait_s: float = 1.0,
        timeout_s: float = 120.0,
        concurrency: int = 16,
        request: dict[str, Any] | None = None,
    ) -> None:
        self.concurrency = concurrency
        self._url, self._model = url.rstrip("/"), model
        self._template, self._pattern, self._best = template, re.compile(pattern), best
        self._retries, self._wait_s = retries, wait_s
        self._request = {"temperature": 0.0, "max_tokens": 1024, **(request or {})}
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = PerLoop(lambda: httpx.AsyncClient(headers=headers, timeout=timeout_s))

    async def __call__(self, prompt: Prompt, answer: Generated) -> float:
        question = self._template.format(prompt=prompt.asked, answer=prompt.answer, response=answer.text)
        return self._score(await self._reply(question))

    def _score(self, reply: str) -> float:
        found = self._pattern.findall(reply)
        score = float(found[-1]) if found else math.nan
        if not 0.0 <= score <= self._best:
            raise JudgeError(f"no score from 0 to {self._best:g} in the judge's reply {reply[-200:]!r}")
        return score / self._best

    async def _reply(self, question: str) -> str:
        body = {"model": self._model, "messages": [{"role": "user", "content": question}], **self._request}
        for trial in range(self._retries + 1):
            try:
                response = await self._client().post(f"{self._url}/chat/completions", json=body)
            except httpx.TransportError as error:
                trouble, wait = f"{type(error).__name__}: {error}", None
            else:
                if response.is_success:
                    return _content(response)
                trouble, wait = f"HTTP {response.status_code}: {response.text[:200]}", _told_to_wait(response)
                if response.status_code not in (408, 409, 429) and response.status_code < 500:
                    raise JudgeError(f"the judge at {self._url} refused: {trouble}")
            if trial < self._retries:
                # Spread out, so that many who were refused together don't come back together.
                await asyncio.sleep(wait if wait is not None else self._wait_s * 2**trial * random.uniform(0.5, 1.5))
        raise JudgeError(f"the judge at {self._url} failed {self._retries + 1} times, the last with {trouble}")


def _content(response: httpx.Response) -> str:
    try:
        return response.json()["choices"][0]["message"]["content"] or ""
    except (ValueError, LookupError, TypeError) as error:
        raise JudgeError(f"not a chat completion: {response.text[:200]!r}") from error


def _told_to_wait(response: httpx.Response) -> float | None:
    """Seconds of the Retry-After header, a minute at most; None where there are none (it may be a date)."""
    try:
        return min(60.0, max(0.0, float(response.headers["retry-after"])))
    except (KeyError, ValueError):
        return None

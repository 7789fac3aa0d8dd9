"""Answers in one piece outlive the engines that begin them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from raytron.inference import EngineFailed, Output, Overloaded, Request, SamplingParams
from raytron.serving.answers import ATTEMPTS, Answer
from raytron.serving.backend import Interrupted
from raytron.serving.metrics import Metrics, Timer


class Failing:
    """Says two words and then what `errors` has for this attempt; with none left it says three and ends."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors, self.asked = list(errors), 0

    async def generate(self, model: str, request: Request) -> AsyncGenerator[list[Output], None]:
        self.asked += 1
        error = self.errors.pop(0) if self.errors else None
        if isinstance(error, Overloaded):
            raise error
        for token in (1, 2):
            yield [Output(request.id, 0, (token,), (0.0,), (0,), "x")]
        if error is not None:
            raise error
        yield [Output(request.id, 0, (3,), (0.0,), (0,), "x", finish_reason="stop")]


def answered(source: Failing, unseen: bool = True) -> tuple[list[int], Timer]:
    timer = Timer(Metrics(), "m", "/v1/completions", 1, 0)
    request = Request("r", (7,), SamplingParams())

    async def main() -> list[int]:
        answer = Answer(source, "m", [request], timer, unseen)
        try:
            return [token async for outputs in answer for _, output in outputs for token in output.token_ids]
        finally:
            await answer.close()

    return asyncio.run(main()), timer


@pytest.mark.parametrize("errors", [(), (Interrupted("gone"),), (Interrupted("gone"), Overloaded(0.0, "full"))])
def test_what_nobody_has_seen_is_asked_again_and_counted_once(errors):
    source = Failing(*errors)
    tokens, timer = answered(source)
    assert tokens == [1, 2, 3]
    assert timer.generated_tokens == 3
    assert source.asked == 1 + len(errors)


def test_what_was_seen_is_not_and_neither_is_what_cannot_be_answered():
    with pytest.raises(Interrupted):
        answered(Failing(Interrupted("gone")), unseen=False)
    for error in (EngineFailed("broken"), ValueError("too long"), Overloaded(0.0, "full")):
        source = Failing(error)
        with pytest.raises(type(error)):
            answered(source)
        assert source.asked == 1


def test_a_request_that_ends_every_engine_is_given_up():
    source = Failing(*[Interrupted("gone")] * 99)
    with pytest.raises(Interrupted):
        answered(source)
    assert source.asked == ATTEMPTS

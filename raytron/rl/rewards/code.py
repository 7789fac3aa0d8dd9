"""Judges programs by running them (in `sandbox.py`) against tests."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

from raytron.rl.environments.base import Generated, Prompt
from raytron.rl.rewards.sandbox import Limits, run_python

__all__ = ["PassesTests", "code_in"]

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def code_in(text: str) -> str:
    """The last fenced block of a text, or all of it where there is none."""
    blocks = _FENCED.findall(text)
    return blocks[-1] if blocks else text


class PassesTests:
    """1.0 for a program that passes all tests of the prompt's answer, else 0.0.

    The answer is Python that follows the program and raises where a test fails (`assert f(2) == 4`), or a sequence of
    (standard input, expected output), compared line by line without trailing blanks. A program that crashes, hangs or
    asks for too much fails its tests: that is a verdict. A machine that can't run it is a SandboxError.

    Args:
        partial: with (input, output) tests, the share that is passed.
        concurrency: programs run at once.
    """

    def __init__(self, limits: Limits | None = None, partial: bool = False, concurrency: int = 4) -> None:
        self.concurrency = concurrency
        self._limits, self._partial = limits or Limits(), partial

    async def __call__(self, prompt: Prompt, answer: Generated) -> float:
        source, tests = code_in(answer.text), prompt.answer
        if not tests:
            raise ValueError(f"prompt {prompt.index} has no tests")
        if isinstance(tests, str):
            return float(await self._asserts(source, tests))
        passed = 0
        for stdin, expected in tests:
            if await self._prints(source, stdin, expected):
                passed += 1
            elif not self._partial:
                return 0.0
        return passed / len(tests)

    async def _asserts(self, source: str, tests: str) -> bool:
        end = secrets.token_hex(8)  # a program that leaves early, by sys.exit(0) say, does not get to print it
        ran = await run_python(f"{source}\n\n{tests}\n\nprint()\nprint({end!r})\n", limits=self._limits)
        return ran.code == 0 and ran.output.endswith(f"\n{end}\n")

    async def _prints(self, source: str, stdin: str, expected: str) -> bool:
        ran = await run_python(source, stdin, self._limits)
        return ran.code == 0 and _lines(ran.output) == _lines(expected)


def _lines(text: str) -> Sequence[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]

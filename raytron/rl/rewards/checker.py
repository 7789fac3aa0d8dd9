"""The process that `checks.py` starts: reads questions as JSON lines, answers each with a verdict or an error.

    checker.py maths ...    {"reference": "1/2", "text": "so it is $0.5$"}  ->  {"verdict": 1.0}

Run as a script, without the package: it starts in a moment, and whatever hangs in here can be killed. Its own alarm
ends it too, in case nobody is left to do so.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import signal
import sys
from typing import Any

_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


@functools.lru_cache(maxsize=1024)
def _parsed(reference: str) -> tuple[Any, ...]:
    from math_verify import parse

    forms = [f"${reference}$", reference]
    if any(mark in reference for mark in ("$", "\\boxed", "\\(", "\\[")):
        forms.reverse()
    for form in forms:
        if found := parse(form, parsing_timeout=None, raise_on_error=True):
            return tuple(found)
    raise ValueError(f"the reference answer {reference[:80]!r} is no mathematical expression")


def maths(reference: str, text: str) -> float:
    """1.0 where the last result in `text` equals `reference`. math-verify's own timeouts (signals) stay off."""
    from math_verify import parse, verify

    found = parse(text, parsing_timeout=None, raise_on_error=True)
    return float(verify(list(_parsed(reference)), found, timeout_seconds=None, raise_on_error=True))


def matches(reference: str, text: str) -> float:
    """1.0 where the whole text matches the pattern."""
    return float(re.fullmatch(reference, text, re.DOTALL) is not None)


def fits(reference: Any, text: str) -> float:
    """1.0 where the text (or the last fenced block in it) is JSON that fits the schema."""
    from jsonschema.validators import validator_for

    kind = validator_for(reference)
    kind.check_schema(reference)
    blocks = _FENCED.findall(text)
    try:
        value = json.loads(blocks[-1] if blocks else text, parse_constant=_no_such_json)
    except ValueError:
        return 0.0
    return float(kind(reference).is_valid(value))


def _no_such_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


# The check, and a question that loads what it needs.
CHECKS = {"maths": (maths, "1", "1"), "matches": (matches, "1", "1"), "fits": (fits, {}, "1")}


def main(name: str, memory_mb: int, alarm_s: int) -> None:
    """Say that all is loaded, then answer until standard input ends. What libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    check, *example = CHECKS[name]
    check(*example)
    replies.write("{}\n")
    for line in sys.stdin:
        question = json.loads(line)
        signal.alarm(alarm_s)
        try:
            reply = {"verdict": check(**question)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.alarm(0)
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

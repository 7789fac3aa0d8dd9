"""What an answer is worth: verifiers, judges, their sum. `judged` makes any of them fit for an environment.

A reward is an `async (prompt, answer) -> float` that raises when it has no opinion; no failure is ever a zero.
"""

from raytron.rl.rewards.base import Reward, Weighted, judged
from raytron.rl.rewards.checks import CheckError, Fits, Matches, Maths
from raytron.rl.rewards.code import PassesTests
from raytron.rl.rewards.exact import Exact, FinalNumber, Tokens
from raytron.rl.rewards.judge import JudgeError, LLMJudge
from raytron.rl.rewards.sandbox import Limits, Ran, SandboxError, run_python

__all__ = [
    "CheckError",
    "Exact",
    "FinalNumber",
    "Fits",
    "JudgeError",
    "LLMJudge",
    "Limits",
    "Matches",
    "Maths",
    "PassesTests",
    "Ran",
    "Reward",
    "SandboxError",
    "Tokens",
    "Weighted",
    "judged",
    "run_python",
]

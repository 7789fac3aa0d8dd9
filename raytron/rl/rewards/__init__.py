"""What an answer is worth: verifiers, judges, their sum. `judged` makes any of them fit for an environment.

A reward is an `async (prompt, answer) -> float` that raises when it has no opinion; no failure is ever a zero.
"""

from raytron.rl.rewards.base import Overall, Reward, Weighted, judged, overall
from raytron.rl.rewards.checks import CheckError, Fits, Matches, Maths
from raytron.rl.rewards.code import PassesTests
from raytron.rl.rewards.exact import Exact, FinalNumber, Tokens
from raytron.rl.rewards.judge import JudgeError, LLMJudge
from raytron.rl.rewards.model import ModelReward, chosen_label, reader
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
    "ModelReward",
    "Overall",
    "PassesTests",
    "Ran",
    "Reward",
    "SandboxError",
    "Tokens",
    "Weighted",
    "chosen_label",
    "judged",
    "overall",
    "reader",
    "run_python",
]

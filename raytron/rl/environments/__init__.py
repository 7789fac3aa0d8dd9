"""The other side of an episode: environments over token ids, and the types that pass between them and an engine."""

from raytron.rl.environments.base import Environment, Generated, Judge, Prompt, StepResult, Task, Verdict
from raytron.rl.environments.tools import TextTools, ToolTurn
from raytron.rl.environments.turns import MultiTurn, Partner, SingleTurn, with_tools

__all__ = [
    "Environment",
    "Generated",
    "Judge",
    "MultiTurn",
    "Partner",
    "Prompt",
    "SingleTurn",
    "StepResult",
    "Task",
    "TextTools",
    "ToolTurn",
    "Verdict",
    "with_tools",
]

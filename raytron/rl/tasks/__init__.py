"""What can be learnt: tasks by name. A task is its own configuration, `build` makes one from a `TaskConfig`."""

from dataclasses import fields
from typing import Any

from raytron.config import from_dict
from raytron.rl.config import TaskConfig
from raytron.rl.environments import Task
from raytron.rl.tasks.calculator import Calculator
from raytron.rl.tasks.copying import Copy, EchoDigit, Reverse
from raytron.rl.tasks.countdown import Countdown
from raytron.rl.tasks.gsm8k import GSM8K
from raytron.rl.tasks.higher_lower import HigherLower

__all__ = ["GSM8K", "TASKS", "Calculator", "Copy", "Countdown", "EchoDigit", "HigherLower", "Reverse", "build"]

TASKS: dict[str, type] = {
    "echo-digit": EchoDigit,
    "copy": Copy,
    "reverse": Reverse,
    "countdown": Countdown,
    "higher-lower": HigherLower,
    "calculator": Calculator,
    "gsm8k": GSM8K,
}


def build(config: TaskConfig, seed: int = 0, model: str | None = None) -> Task:
    """The task that `config` names. ValueError for an unknown name or option; says which there are.

    model: directory of the model to start from, whose tokenizer a task of texts takes unless it is given another.
    """
    if config.name not in TASKS:
        raise ValueError(f"task.name {config.name!r} is unknown; there are {', '.join(TASKS)}")
    kind = TASKS[config.name]
    given: dict[str, Any] = {"seed": seed}
    if model is not None and any(field.name == "tokenizer" for field in fields(kind)):
        given["tokenizer"] = model
    return from_dict(kind, given | config.options, "task.options")

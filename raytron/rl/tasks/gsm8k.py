"""GSM8K (Cobbe et al. 2021), or any JSONL of questions and answers whose result stands behind ####.

    {"question": "Natalia sold clips ...", "answer": "Natalia sold 48/2 = ... \\n#### 72"}

Prompts go through the model's own chat template, unless it has none. With `calculator` the model may call a tool
(`raytron.rl.environments.tools`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from raytron.data import HFTokenizer, Tokenizer, load_tokenizer
from raytron.data.chat import ChatTemplate, Rendered
from raytron.rl.environments import Environment, Judge, MultiTurn, Prompt, SingleTurn, TextTools, ToolTurn, with_tools
from raytron.rl.rewards import FinalNumber, Maths, judged
from raytron.rl.seeds import chance
from raytron.rl.tasks.arithmetic import value_of, written
from raytron.rl.tasks.base import Named, require

__all__ = ["GSM8K"]

_TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Value of an arithmetic expression, such as 3 * (4 + 5)",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}


@dataclass(frozen=True)
class GSM8K(Named):
    """Word problems with a number as the result."""

    path: str = ""
    """JSONL with `question` and `answer` to train on."""
    evaluation_path: str | None = None
    """The same to evaluate on; without it, the first of `path`, which are then not trained on."""
    evaluation_size: int = 256
    """Prompts of evaluation."""
    tokenizer: str = ""
    """The model's directory, or what `raytron.data.load_tokenizer` takes."""
    chat: bool = True
    """Use the chat template, if the directory has one; else the question is followed by "Answer:"."""
    instruction: str = "Think step by step, then write the result as a number on a last line that begins with ####."
    """Follows each question."""
    verifier: Literal["marked", "last", "maths"] = "marked"
    """The number behind ####; the same or else the last number; math-verify on the whole text."""
    max_tokens: int = 512
    """Of an answer."""
    calculator: bool = False
    """Offer a calculator."""
    turns: int = 4
    """Answers of an episode, calls included, where there is a calculator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.path), "gsm8k needs `path`, a JSONL file with `question` and `answer` in each line")
        require(bool(self.tokenizer), "gsm8k needs `tokenizer`, the model's directory")
        for name in ("evaluation_size", "max_tokens", "turns"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")

    @cached_property
    def _examples(self) -> tuple[list[Mapping[str, str]], list[Mapping[str, str]]]:
        """(training, evaluation)."""
        lines, size = _read(self.path), self.evaluation_size
        if self.evaluation_path is not None:
            return lines, _read(self.evaluation_path)[:size]
        require(len(lines) > size, f"{self.path} has {len(lines)} lines, of which {size} are held out; name another")
        return lines[size:], lines[:size]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return ChatTemplate(self.tokenizer) if self.chat and Path(self.tokenizer).is_dir() else None

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's own, and those of generation_config.json."""
        file = Path(self.tokenizer, "generation_config.json")
        ids = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        named = () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
        return tuple(dict.fromkeys((self._tokenizer.eod, *named)))

    stop_token_ids = ()

    @property
    def stop(self) -> tuple[str, ...]:
        """Of a model without a template, which would go on with a question of its own."""
        return self._rendered("").stop

    @property
    def vocab_size(self) -> int:
        """Ids there are."""
        return self._tokenizer.vocab_size

    def prompt(self, index: int) -> Prompt:
        """Question `index` of endless passes, each in another order."""
        examples = self._examples[0]
        epoch, at = divmod(index, len(examples))
        return self._asking(index, examples[self._order(epoch)[at]])

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self._examples[0])))
            chance(self.seed, "epoch", epoch).shuffle(order)
            self._orders[epoch] = order
        return self._orders[epoch]

    @cached_property
    def _orders(self) -> dict[int, list[int]]:
        return {}

    def evaluation(self) -> Sequence[Prompt]:
        """The held-out questions."""
        return [self._asking(index, example) for index, example in enumerate(self._examples[1])]

    def _asking(self, index: int, example: Mapping[str, str]) -> Prompt:
        text = self._rendered(example["question"]).prompt
        result = example["answer"].rpartition("####")[2].strip().replace(",", "")
        said = example["answer"] if self._template else f" {example['answer']}"
        solution = (*self._tokenizer.encode(said), self.eos_token_ids[0])
        return Prompt(index, tuple(self._tokenizer.encode(text)), result, text, (solution,), example["question"])

    def _rendered(self, question: str) -> Rendered:
        said = f"{question}\n{self.instruction}".strip()
        if self._template is None:
            return Rendered(f"Question: {said}\nAnswer:", ("\nQuestion:",))
        tools = [_TOOL] if self.calculator else None
        return self._template.render([{"role": "user", "content": said}], tools)

    def decode(self, token_ids: Sequence[int], special: bool = False) -> str:
        """Text of tokens; special: with the special ones."""
        if special and isinstance(self._tokenizer, HFTokenizer):
            return self._tokenizer.backend.decode(list(token_ids), skip_special_tokens=False)
        return self._tokenizer.decode(token_ids)

    def save_tokenizer(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files."""
        self._tokenizer.save(directory)

    @cached_property
    def _judge(self) -> Judge:
        if self.verifier == "maths":
            return judged(Maths())
        return judged(FinalNumber(strict=self.verifier == "marked"))

    @cached_property
    def _tools(self) -> TextTools:
        turn = ToolTurn("\nTool: ", "\nAnswer:") if self._template is None else ToolTurn.of(self._template)
        tools: dict[str, Any] = {"calculator": lambda expression: written(value_of(str(expression)))}
        return TextTools(tools, self._tokenizer.encode, turn)

    def environment(self) -> Environment:
        """For one episode."""
        if not self.calculator:
            return SingleTurn(self._judge)
        return MultiTurn(with_tools(self._tools, self._judge), self.turns)


def _read(path: str) -> list[Mapping[str, str]]:
    """Examples of a JSONL file. ValueError names the line that isn't one."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ValueError(
            f"{path} can't be read ({error.strerror}); name a JSONL file of questions and answers"
        ) from error
    examples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                example = json.loads(line)
                example["question"], example["answer"].rpartition
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}:{number} is no JSON object with `question` and `answer`; mend or remove it"
                ) from error
            examples.append(example)
    require(bool(examples), f"{path} is empty; it should have a question and an answer in each line")
    return examples

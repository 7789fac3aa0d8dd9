"""A file of prompts in, a file of generations out, which can be cut off at any time and gone on with.

Input: a text file with a prompt on every line, or JSON lines with "prompt" (a text), "prompt_token_ids" or "messages"
(a chat), and with any field of `SamplingParams` for that prompt alone. Output: JSON lines with "index" (the input's
line), what was asked and what came of it, appended as they are finished and put in the input's order at the end.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytron.config import from_dict, to_dict
from raytron.data.chat import Rendered
from raytron.inference.llm import LLM
from raytron.inference.types import Generation, SamplingParams

__all__ = ["Summary", "generate_file", "read_prompts"]

_ASKED = ("prompt", "prompt_token_ids", "messages")
_PARAMS = {f.name for f in dataclasses.fields(SamplingParams)}


@dataclass(frozen=True)
class Summary:
    """prompts: answered now; kept: found answered in the output already; tokens: generated now."""

    prompts: int
    kept: int
    tokens: int


@dataclass(frozen=True)
class _Line:
    index: int
    asked: dict[str, Any]
    prompt: str | tuple[int, ...]
    params: SamplingParams


def read_prompts(
    path: Path, params: SamplingParams, render: Callable[[list[dict]], Rendered] | None = None
) -> Iterator[_Line]:
    """The prompts of a file; `params` where a line says nothing else.

    Args:
        render: the model's chat template, `ChatTemplate.render`.

    Raises ValueError for a line that cannot be used; names file and line.
    """
    with path.open(encoding="utf-8") as file:
        for index, text in enumerate(file):
            where = f"{path}:{index + 1}"
            if path.suffix != ".jsonl":
                yield _Line(index, {"prompt": text.rstrip("\n")}, text.rstrip("\n"), params)
            elif text.strip():
                yield _parse(index, text, where, params, render)


def _parse(index: int, text: str, where: str, params: SamplingParams, render: Any) -> _Line:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    given = [name for name in _ASKED if isinstance(fields, Mapping) and name in fields]
    if len(given) != 1:
        raise ValueError(f"{where}: expected an object with one of {', '.join(_ASKED)}")
    unknown = fields.keys() - _PARAMS - set(_ASKED) - {"id"}
    if unknown:
        raise ValueError(f"{where}: unknown field {min(unknown)!r}; there are id and {', '.join(sorted(_PARAMS))}")
    own = to_dict(params) | {name: value for name, value in fields.items() if name in _PARAMS}
    prompt = fields[given[0]]
    if given[0] == "messages":
        if render is None:
            raise ValueError(f"{where}: messages need a chat template, and none was given")
        rendered = render(prompt)
        prompt, own["stop"] = rendered.prompt, [*own["stop"], *rendered.stop]
    elif given[0] == "prompt_token_ids":
        if not (isinstance(prompt, list) and all(type(token) is int for token in prompt)):
            raise ValueError(f"{where}: prompt_token_ids must be a list of integers")
        prompt = tuple(prompt)
    elif not isinstance(prompt, str):
        raise ValueError(f"{where}: prompt must be a text")
    asked = {name: fields[name] for name in ("id", given[0]) if name in fields}
    try:
        return _Line(index, asked, prompt, from_dict(SamplingParams, own, "parameters"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def generate_file(
    llm: LLM,
    source: Path,
    output: Path,
    params: SamplingParams,
    *,
    render: Callable[[list[dict]], Rendered] | None = None,
    on_done: Callable[[Generation], None] | None = None,
) -> Summary:
    """Answer the prompts of `source` that `output` has no answer to yet.

    Raises:
        ValueError: a prompt that cannot be used, or an output that was made from other prompts. What was answered
            before stays in the output.
    """
    done = _answered(output)
    lines: dict[int, _Line] = {}
    tokens = 0

    def waiting() -> Iterator[tuple[Any, SamplingParams]]:
        for line in read_prompts(source, params, render):
            if line.index in done:
                _same(line, done[line.index], output)
            else:
                lines[len(numbers)] = line
                numbers.append(line.index)
                yield line.prompt, line.params

    numbers: list[int] = []
    with output.open("a", encoding="utf-8") as file:
        for generation in llm.stream(waiting(), window=4 * llm.config.max_num_seqs):
            line = lines.pop(int(generation.request_id))
            file.write(json.dumps(_record(line, generation), ensure_ascii=False) + "\n")
            file.flush()
            tokens += sum(len(o.token_ids) for o in generation.outputs)
            if on_done is not None:
                on_done(generation)
    _sort(output)
    return Summary(len(numbers), len(done), tokens)


def _record(line: _Line, generation: Generation) -> dict[str, Any]:
    outputs = [
        {
            "text": output.text,
            "token_ids": output.token_ids,
            "logprobs": output.logprobs,
            "finish_reason": output.finish_reason,
        }
        for output in generation.outputs
    ]
    return {"index": line.index, **line.asked, "outputs": outputs}


def _answered(output: Path) -> dict[int, dict[str, Any]]:
    """Line number -> record, of an output file that exists; a last line that was cut off is taken away."""
    if not output.exists():
        return {}
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(output, len(whole))
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        return {record["index"]: record for record in records}
    except (json.JSONDecodeError, TypeError, KeyError):
        raise ValueError(f"{output} exists and holds something else; choose another output") from None


def _same(line: _Line, record: Mapping[str, Any], output: Path) -> None:
    if any(record.get(name) != value for name, value in line.asked.items()):
        raise ValueError(f"{output} was made from other prompts (line {line.index + 1} differs); choose another output")


def _sort(output: Path) -> None:
    records = _answered(output)
    temporary = output.with_name(f".{output.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for index in sorted(records):
            file.write(json.dumps(records[index], ensure_ascii=False) + "\n")
    temporary.replace(output)

"""Lines as examples: what is learnt is what the model is to say, to the character, and bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron.data.examples import PROMPT_KEYS, RESPONSE_KEYS, ExampleReader, example_files
from raytron.data.tokenizer import ByteTokenizer, HFTokenizer, NullTokenizer

BYTE = ByteTokenizer()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen 3 does: an empty thought before the last answer, and none before those of earlier turns.
THINKING = CHATML.replace(
    "\n{{ m.content", "\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
SPECIALS = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>"]
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two? 1"},
    {"role": "assistant", "content": "2, naïve 🙂"},
]


def tokenizer(folder: Path, template: str | None = None) -> HFTokenizer:
    """Bytes and the special tokens of a chat, as a directory."""
    backend = tokenizers.Tokenizer.from_buffer(BYTE.files["tokenizer.json"])
    backend.add_special_tokens(SPECIALS)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
    )
    named = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    HFTokenizer(
        {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(named).encode()}
    ).save(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return HFTokenizer.read(folder)


def read(folder: Path, lines: list, own=None, chat: bool = False) -> list:
    file = folder / "lines.jsonl"
    file.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return list(ExampleReader(own or BYTE, str(folder), chat).read(file))


def texts(own, example) -> list[tuple[str, bool]]:
    """Runs of tokens that are learnt or not, as text with special tokens."""
    runs: list[tuple[list[int], bool]] = []
    for token, learnt in zip(example.tokens, example.chosen, strict=True):
        if not runs or runs[-1][1] != learnt:
            runs.append(([], learnt))
        runs[-1][0].append(token)
    return [(own.backend.decode(ids, skip_special_tokens=False), learnt) for ids, learnt in runs]


@settings(deadline=None)
@given(st.text(min_size=1), st.text(min_size=1), st.sampled_from(PROMPT_KEYS), st.sampled_from(RESPONSE_KEYS))
def test_exactly_the_response_and_the_end_token_are_learnt(tmp_path_factory, prompt, response, asked, said):
    (example,) = read(tmp_path_factory.getbasetemp(), [{asked: prompt, said: response, "source": 1}])
    given_, learnt = BYTE.encode(prompt), BYTE.encode(response)
    assert example.tokens == given_ + learnt + ([] if learnt[-1] == BYTE.eod else [BYTE.eod])
    assert example.chosen == [i >= len(given_) for i in range(len(example.tokens))]


def test_a_prompt_is_opened_as_engines_open_it(tmp_path):
    own = tokenizer(tmp_path)
    (example,) = read(tmp_path, [{"prompt": "a", "response": "b"}], own)
    assert texts(own, example) == [("<|begin|>a", False), ("b<|im_end|>", True)]
    assert example.tokens[:2] == own.backend.encode("a").ids


@pytest.mark.parametrize(
    ("template", "runs"),
    [
        (
            CHATML,
            [
                "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n",
                "1<|im_end|>",
                "\n<|im_start|>user\nTwo? 1<|im_end|>\n<|im_start|>assistant\n",
                "2, naïve 🙂<|im_end|>",
            ],
        ),
        (
            THINKING,
            [
                "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n",
                "1<|im_end|>",
                "\n<|im_start|>user\nTwo? 1<|im_end|>\n<|im_start|>assistant\n",
                "<think>\n\n</think>\n\n2, naïve 🙂<|im_end|>",
            ],
        ),
        (
            LLAMA,
            [
                "<|begin|><|head|>system<|/head|>\n\nBe short.<|im_end|><|head|>user<|/head|>\n\nOne?<|im_end|>"
                "<|head|>assistant<|/head|>\n\n",
                "1<|im_end|>",
                "<|head|>user<|/head|>\n\nTwo? 1<|im_end|><|head|>assistant<|/head|>\n\n",
                "2, naïve 🙂<|im_end|>",
            ],
        ),
        (None, ["Be short.\n\nUser: One?\nAssistant:", " 1", "\nUser: Two? 1\nAssistant:", " 2, naïve 🙂<|im_end|>"]),
    ],
    ids=["chatml", "thinking", "llama", "plain"],
)
def test_every_turn_of_the_assistant_is_learnt_and_nothing_else(tmp_path, template, runs):
    own = tokenizer(tmp_path, template)
    wanted = [(text, i % 2 == 1) for i, text in enumerate(runs)]
    (whole, followed) = read(
        tmp_path, [{"messages": CHAT}, {"messages": [*CHAT, {"role": "user", "content": "?"}]}], own
    )
    assert texts(own, whole) == wanted
    if template != THINKING:  # there the answer is no longer the last message
        assert texts(own, followed) == wanted  # what follows the last answer is nothing to learn from


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<>\ue000"), min_size=1), min_size=2, max_size=6)
)
def test_what_is_learnt_of_any_chat_is_what_the_assistant_said(tmp_path_factory, said):
    folder = tmp_path_factory.getbasetemp() / "chatml"
    own = tokenizer(folder, CHATML)
    said = [text.strip() or "x" for text in said]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    (example,) = read(folder, [{"messages": messages}], own)
    assert [text for text, learnt in texts(own, example) if learnt] == [f"{text}<|im_end|>" for text in said[1::2]]


def test_tool_calls_are_learnt_and_results_are_not(tmp_path):
    own = tokenizer(tmp_path, LLAMA)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3."},
    ]
    (example,) = read(tmp_path, [{"messages": messages}], own)
    learnt = [text for text, learnt in texts(own, example) if learnt]
    assert learnt[1] == "3.<|im_end|>"
    assert json.loads(learnt[0].removesuffix("<|im_end|>")) == call["function"]


def test_pairs_can_be_rendered_as_chats(tmp_path):
    own = tokenizer(tmp_path, CHATML)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    pair, chat = read(tmp_path, [{"prompt": "q", "response": "r"}, {"messages": turns}], own, chat=True)
    assert (pair.tokens, pair.chosen) == (chat.tokens, chat.chosen)


def test_trajectories_are_taken_as_they_are(tmp_path):
    (example,) = read(tmp_path, [{"tokens": [5, 6, 7, 8], "chosen": [0, 1, 0, 1], "text": "whatever"}])
    assert (example.tokens, example.chosen) == ([5, 6, 7, 8], [False, True, False, True])


def test_files_of_a_folder_come_in_the_order_of_their_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / name).write_text("{}\n")
    assert [file.name for file in example_files(str(tmp_path))] == ["a.jsonl", "b.jsonl"]


USER = {"role": "user", "content": "q"}
BAD = [
    ("{oh\n", ":2: malformed JSON", "mend or remove"),
    ("[1]\n", ":2: a JSON list where an object is needed", '{"prompt"'),
    ({"text": "a"}, ":2: none of the keys prompt, question, instruction, there is text", '"messages"'),
    ({"prompt": "a"}, ":2: none of the keys response, completion, answer", "there is prompt"),
    ({"prompt": "a", "response": 3}, ":2: 'response' holds int, not text", ""),
    ({"prompt": "a", "response": ""}, ":2: 'response' is empty", "remove the line"),
    ({"prompt": "", "response": "a"}, ":2: the prompt is empty", "follow something"),
    ('{"prompt": "\\ud800", "response": "a"}\n', ":2: half of a surrogate pair in 'prompt'", ""),
    ({"messages": "hi"}, ":2: `messages` must be a list", '"role"'),
    ({"messages": [USER]}, ":2: no message is an assistant's", "remove"),
    ({"messages": [USER, {"role": "robot", "content": "a"}]}, ":2: message 2 has the role 'robot'", "assistant"),
    ({"messages": [USER, {"role": "assistant", "content": 1}]}, ":2: 'content of message 2' holds int", ""),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, ":2: message 2, an assistant's, is empty", "remove"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [1]}]}, ":2: message 2 has tool calls unlike", "function"),
    ({"tokens": [1, 2], "chosen": [1]}, ":2: `tokens` and `chosen` must be lists of one length", ""),
    ({"tokens": [1, 900], "chosen": [0, 1]}, ":2: `tokens` must be ids from 0 to 256", "data.tokenizer"),
    ({"tokens": [1, 2], "chosen": [1, 0]}, ":2: no token behind the first is chosen", "remove"),
    ({"tokens": [1, 2], "chosen": [0, 5]}, ":2: `chosen` must hold true or false", ""),
]


@pytest.mark.parametrize(("line", "what", "mend"), BAD)
def test_a_bad_line_is_named_and_said_how_to_mend(tmp_path, line, what, mend):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, [{"prompt": "a", "response": "b"}, line])
    assert what in str(caught.value)
    assert str(tmp_path / "lines.jsonl") in str(caught.value)
    assert mend in str(caught.value)


def test_other_bad_files(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin.jsonl:1 isn't UTF-8"):
        list(ExampleReader(BYTE, str(tmp_path)).read(tmp_path / "latin.jsonl"))
    with pytest.raises(ValueError, match=r"lines.jsonl:1 to :1: 'q' isn't an integer"):
        read(tmp_path, [{"prompt": "q", "response": "1"}], NullTokenizer(9))
    with pytest.raises(ValueError, match="isn't there"):
        example_files(str(tmp_path / "none.jsonl"))
    (tmp_path / "only").mkdir()
    (tmp_path / "only/a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"no \.jsonl"):
        example_files(str(tmp_path / "only"))
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system please') }}")
    with pytest.raises(ValueError, match=r"lines.jsonl:1: .*no system please.*; mend or remove the line"):
        read(tmp_path, [{"messages": CHAT}])
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="leaves out message 3, an assistant's"):
        read(tmp_path, [{"messages": CHAT}])

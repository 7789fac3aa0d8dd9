"""Tasks: prompts are a pure function of (seed, index), the perfect player wins, what is wrong earns less."""

from __future__ import annotations

import asyncio
import json
import pickle
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.rl.config import TaskConfig
from raytron.rl.rewards.exact import prefix_share
from raytron.rl.tasks import GSM8K, TASKS, Calculator, Copy, Countdown, EchoDigit, HigherLower, Reverse, build
from raytron.rl.tasks.arithmetic import evaluate, value_of, written
from tests.rl.players import Engine, play

SMALL = {name: kind for name, kind in TASKS.items() if name != "gsm8k"}
GSM8K_TEST = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"  # beside the checkout


def halving(task: HigherLower):
    """Guesses the middle of what is left."""

    def player(context):
        low, high = 1, task.numbers
        words = task.decode(context).split()
        for guess, hint in zip(words[::2], words[1::2], strict=True):
            low, high = (int(guess) + 1, high) if hint == "higher" else (low, int(guess) - 1)
        return task.vocabulary.ids((low + high) // 2)

    return player


def calling(task: Calculator, prompt):
    """Calls, then copies what came back."""
    call = prompt.answer[0]

    def player(context):
        return call if context == prompt.token_ids else (*context[len(prompt.token_ids) + len(call) :], 1)

    return player


def perfect(task, prompt):
    if isinstance(task, HigherLower):
        return halving(task)
    if isinstance(task, Calculator):
        return calling(task, prompt)
    return lambda context: prompt.solution[0]


@pytest.mark.parametrize("name", SMALL)
def test_prompts_are_a_pure_function_of_seed_and_index(name):
    one, same, other = (build(TaskConfig(name), seed) for seed in (3, 3, 4))
    wanted = [one.prompt(i) for i in range(40)]
    assert [same.prompt(i) for i in reversed(range(40))] == wanted[::-1]
    assert [other.prompt(i) for i in range(40)] != wanted
    assert [prompt.index for prompt in wanted] == list(range(40))
    assert list(one.evaluation()) == list(same.evaluation())
    assert all(0 <= i < one.vocab_size for prompt in wanted for i in prompt.token_ids)


@pytest.mark.parametrize("name", SMALL)
def test_a_task_survives_the_way_to_another_process(name):
    task = build(TaskConfig(name), 5)
    play(task, task.prompt(0), perfect(task, task.prompt(0)))  # what it made for itself stays here
    copy = pickle.loads(pickle.dumps(task))
    assert copy == task
    assert copy.prompt(9) == task.prompt(9)


@pytest.mark.parametrize(
    "task",
    [
        EchoDigit(),
        EchoDigit(dense=False, digits=3),
        Copy(),
        Copy(length=7, digits=2, dense=False),
        Reverse(),
        Countdown(),
        Countdown(numbers=4, operators="+-*/", largest=12, largest_target=60),
        Countdown(numbers=2, operators="-"),
        Calculator(),
        Calculator(terms=4, largest=99, dense=False),
        HigherLower(turns=4),
        HigherLower(numbers=3, turns=2),
    ],
    ids=str,
)
def test_the_perfect_player_gets_the_highest_reward(task):
    for prompt in [task.prompt(i) for i in range(25)] + list(task.evaluation())[:5]:
        got = play(task, prompt, perfect(task, prompt))
        assert got.reward == 1.0, (prompt, got)
        assert not got.truncated


def test_halving_finds_seven_of_eight():
    task = HigherLower()
    rewards = {prompt.answer: play(task, prompt, halving(task)).reward for prompt in map(task.prompt, range(200))}
    assert sorted(rewards) == list(range(1, 9))
    assert sum(rewards.values()) == 7


def test_a_guess_that_is_no_number_is_lost():
    task = HigherLower(turns=2)
    prompt = task.prompt(0)
    engine = Engine(
        lambda context: task.vocabulary.ids("higher") if len(context) == 1 else task.vocabulary.ids(prompt.answer)
    )
    from raytron.rl.episodes import run_episode

    got = asyncio.run(run_episode(engine, task, prompt))
    assert task.decode(got.tokens, special=True).split() == ["<bos>", "higher", "?", str(prompt.answer)]
    assert got.chosen.tolist() == [False, True, False, True]
    assert got.reward == 1.0
    lost = play(task, prompt, lambda context: task.vocabulary.ids("<eos>"))
    assert (lost.reward, lost.info["turns"], lost.truncated) == (0.0, 2, False)


@given(st.lists(st.integers(0, 12), max_size=7))
def test_copying_pays_by_the_right_start(ids):
    task, exact = Copy(), Copy(dense=False)
    prompt = task.prompt(4)
    answer = [*ids, 1] if 1 not in ids else ids
    answer = answer[: answer.index(1) + 1][: task.max_tokens]
    got = play(task, prompt, lambda context: answer)
    assert got.reward == prefix_share(answer, prompt.answer)
    assert got.truncated == (answer[-1] != 1)
    assert play(exact, prompt, lambda context: answer).reward == float(tuple(answer) == prompt.answer)


def test_evaluation_of_a_small_task_is_all_of_it():
    assert [task.answer for task in EchoDigit().evaluation()] == [(3 + d, 1) for d in range(10)]
    assert len(Copy().evaluation()) == 64


def test_countdown_judges_value_form_and_numbers():
    task = Countdown()
    prompt = next(p for p in map(task.prompt, range(99)) if len(set(p.answer.numbers)) == 3 and p.answer.target > 3)
    a, b, c = prompt.answer.numbers

    def worth(*words):
        return play(task, prompt, lambda context: task.vocabulary.ids(*words)).reward

    assert worth(*prompt.answer.solution, "<eos>") == 1.0
    assert worth("(", *prompt.answer.solution, ")", "<eos>") == 1.0
    sums = [Fraction(a + b + c), Fraction(prompt.answer.target)]
    assert worth(a, "+", b, "+", c, "<eos>") == (1.0 if sums[0] == sums[1] else 0.1)
    assert worth(prompt.answer.target, "<eos>") == 0.0  # the target itself is not one of the numbers
    assert worth(a, "+", b, "<eos>") == 0.0
    assert worth(a, "+", b, "+", c, "+", c, "<eos>") == 0.0
    assert worth(a, b, c, "<eos>") == 0.0
    assert worth("<eos>") == 0.0
    assert worth(*prompt.answer.solution) == 0.0  # never ended


@given(st.integers(0, 10**6), st.integers(2, 5), st.sampled_from(["+-*", "+", "-", "*", "+-*/"]))
def test_countdown_problems_have_a_solution(index, numbers, operators):
    problem = Countdown(numbers=numbers, operators=operators).prompt(index).answer
    assert evaluate(problem.solution) == problem.target
    assert sorted(int(word) for word in problem.solution if word.isdecimal()) == sorted(problem.numbers)


def test_the_calculator_pays_for_calls_and_answers():
    task = Calculator()
    prompt = task.prompt(0)
    call, value = prompt.answer

    def worth(*answers, task=task):
        left = iter(answers)
        return play(task, prompt, lambda context: next(left))

    assert worth(call, value).reward == 1.0
    assert worth(value).reward == 0.5  # in the head
    assert worth((value[0], 1)).reward == 0.0  # a guess that begins well
    assert worth(call, (1,)).reward == 0.5 + prefix_share((1,), value) / 2
    elsewhere = (*task.vocabulary.ids("?", "?"), *call[2:])
    assert worth((*call[:2], 1)).reward == worth(elsewhere, (1,)).reward == 0.5 * 2 / len(call)
    assert worth(value, task=Calculator(dense=False)).reward == 1.0
    wrong = worth(task.vocabulary.ids("+", "="), call, value)
    assert task.decode(wrong.tokens[len(prompt.token_ids) :]).split()[2] == "?"
    endless = worth(call, call, call)
    assert (endless.reward, endless.info["turns"]) == (0.5, 3)
    observed = task.decode(worth(call, value).tokens[len(prompt.token_ids) + len(call) :][: len(value) - 1])
    assert observed == task.decode(value)


words = st.recursive(
    st.integers(0, 99).map(lambda n: [str(n)]),
    lambda part: (
        st.tuples(part, st.sampled_from("+-*/"), part).map(lambda p: ["(", *p[0], p[1], *p[2], ")"])
        | part.map(lambda p: ["-", *p])
    ),
    max_leaves=8,
)


@given(words)
def test_arithmetic_agrees_with_python(expression):
    exact = " ".join(f"Fraction({w})" if w.isdecimal() else w for w in expression)
    try:
        expected = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="division by zero"):
            evaluate(expression)
        return
    assert evaluate(expression) == value_of(" ".join(expression)) == value_of("".join(expression)) == expected


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9))
def test_operators_bind_and_associate_as_usual(a, b, c):
    assert value_of(f"{a} - {b} - {c}") == a - b - c
    assert value_of(f"{a} - {b} * {c}") == a - b * c
    assert value_of(f"{a} / {b} / {c}") == Fraction(a, b * c)
    assert value_of(f"-{a} + {b}") == b - a


@pytest.mark.parametrize(
    "text", ["", "1 +", "(1", "1)", "1 2", "* 2", "1 ** 2", "x", "1e9", "__import__('os')", "1" * 99]
)
def test_what_is_no_arithmetic_is_an_error(text):
    with pytest.raises(ValueError):
        value_of(text)


def test_deep_arithmetic_is_an_error_and_not_a_crash():
    with pytest.raises(ValueError):
        value_of("(" * 5000 + "1" + ")" * 5000)


def test_results_are_written_as_people_do():
    assert written(Fraction(-6, 2)) == "-3"
    assert written(Fraction(1, 4)) == "0.25"
    assert written(Fraction(1, 3)) == "0.3333333333"


@pytest.mark.parametrize("name", SMALL)
def test_transformers_reads_the_tokenizer(name, tmp_path):
    from transformers import AutoTokenizer

    task = build(TaskConfig(name))
    task.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = task.prompt(0)
    text = task.decode(prompt.token_ids, special=True)
    assert tuple(tokenizer(text, add_special_tokens=False).input_ids) == prompt.token_ids
    assert tokenizer.decode(prompt.token_ids) == text
    assert tokenizer.decode(prompt.token_ids, skip_special_tokens=True) == task.decode(prompt.token_ids)
    assert (tokenizer.eos_token_id,) == task.eos_token_ids
    assert len(tokenizer) == task.vocab_size


def test_raytron_reads_the_tokenizer(tmp_path):
    from raytron.data import load_tokenizer

    task = Copy()
    task.save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eod == 1
    assert tuple(tokenizer.encode("<bos> 3 1 =")) == task.vocabulary.ids("<bos>", 3, 1, "=")


def test_options_are_checked_and_named():
    assert build(TaskConfig("copy", {"length": 6, "digits": 4}), seed=2) == Copy(length=6, digits=4, seed=2)
    with pytest.raises(ValueError, match="unknown key 'turns'; Copy has seed, length, digits, dense"):
        build(TaskConfig("copy", {"turns": 3}))
    with pytest.raises(ValueError, match="'chess' is unknown; there are echo-digit, copy"):
        build(TaskConfig("chess"))
    with pytest.raises(ValueError, match="expected int"):
        build(TaskConfig("copy", {"length": "long"}))
    for name, options in {"copy": {"length": 0}, "higher-lower": {"numbers": 1}, "calculator": {"turns": 1}}.items():
        with pytest.raises(ValueError, match=r"at least|are 2"):
            build(TaskConfig(name, options))


# GSM8K


@pytest.fixture
def examples(tmp_path) -> Path:
    lines = [
        {"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1:,}\n#### {n + 1:,}"} for n in range(995, 1005)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


def gsm8k(examples, **options) -> GSM8K:
    return GSM8K(**{"path": str(examples), "tokenizer": "byte", "evaluation_size": 2, **options})


def spelt(task: GSM8K, text: str):
    return lambda context: (*task._tokenizer.encode(text), *task.eos_token_ids)


def test_gsm8k_judges_the_number_behind_the_mark(examples):
    task = gsm8k(examples)
    for prompt in task.evaluation():
        assert play(task, prompt, spelt(task, f" easy\n#### {prompt.answer}")).reward == 1.0
        assert play(task, prompt, spelt(task, f" easy\n#### {prompt.answer}0")).reward == 0.0
        assert play(task, prompt, spelt(task, f" it is {prompt.answer}")).reward == 0.0
        assert play(gsm8k(examples, verifier="last"), prompt, spelt(task, f" it is {prompt.answer}")).reward == 1.0
    assert [prompt.answer for prompt in task.evaluation()] == ["996", "997"]


def test_gsm8k_passes_over_all_questions_in_ever_new_orders(examples):
    task = gsm8k(examples, seed=3)
    passes = [[task.prompt(epoch * 8 + i).answer for i in range(8)] for epoch in range(4)]
    assert all(sorted(answers) == [str(n) for n in sorted(map(str, range(998, 1006)))] for answers in passes)
    assert len({tuple(answers) for answers in passes}) == 4
    assert gsm8k(examples, seed=3).prompt(13) == task.prompt(13)
    assert {p.answer for p in task.evaluation()}.isdisjoint(passes[0])


def test_gsm8k_through_a_chat_template(examples, tmp_path):
    task = chat_task(examples, tmp_path)
    prompt = task.prompt(0)
    assert prompt.text.startswith("<|user|>What is ")
    assert prompt.text.endswith("<|end|><|assistant|>")
    assert task.decode(prompt.token_ids, special=True) == prompt.text
    assert task.stop == ()
    got = play(task, prompt, spelt(task, f"#### {prompt.answer}"))
    assert (got.reward, got.truncated) == (1.0, False)


def test_gsm8k_with_a_calculator(examples, tmp_path):
    task = chat_task(examples, tmp_path, calculator=True)
    prompt = task.prompt(0)
    number = int(prompt.answer) - 1
    call = {"name": "calculator", "arguments": {"expression": f"{number} + 1"}}
    left = iter([f"<tool_call>{json.dumps(call)}</tool_call>", f"#### {prompt.answer}"])
    got = play(task, prompt, lambda context: (*task._tokenizer.encode(next(left)), *task.eos_token_ids))
    assert got.reward == 1.0
    seen = [int(t) for t, chosen in zip(got.tokens, got.chosen, strict=True) if not chosen][len(prompt.token_ids) :]
    assert (
        task.decode(seen, special=True) == f"<|tool|>{prompt.answer}<|end|><|assistant|>"
    )  # <|end|> came from the model
    assert task.decode(got.tokens, special=True).count("<|end|>") == 4


@pytest.mark.parametrize(
    "call", ["not json", '{"name": "shell"}', '{"name": "calculator", "arguments": {"x": 1}}', "[]"]
)
def test_a_bad_call_is_answered_with_what_was_wrong(examples, tmp_path, call):
    task = chat_task(examples, tmp_path, calculator=True)
    left = iter([f"<tool_call>{call}</tool_call>", "#### 0"])
    got = play(task, task.prompt(0), lambda context: (*task._tokenizer.encode(next(left)), *task.eos_token_ids))
    assert got.reward == 0.0
    assert "error: " in task.decode(got.tokens)


def chat_task(examples, folder, **options) -> GSM8K:
    """With a directory whose tokenizer has turns: bytes, and <|user|> <|assistant|> <|tool|> <|end|>."""
    import tokenizers

    from raytron.data import ByteTokenizer

    backend = tokenizers.Tokenizer.from_str(ByteTokenizer().backend.to_str())
    backend.add_special_tokens(["<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"])
    (folder / "tokenizer.json").write_text(backend.to_str())
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": template}))
    return gsm8k(examples, tokenizer=str(folder), **options)


def test_end_tokens_of_the_generation_config_count(examples, tmp_path):
    task = chat_task(examples, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 260]}')
    assert task.eos_token_ids == (260, 256)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty"),
        ("{}\n", ":1 is no JSON object"),
        ('{"question": "?", "answer": 3}\n', ":1"),
        ("nonsense", ":1"),
    ],
)
def test_a_file_that_is_no_gsm8k_is_named(tmp_path, content, reason):
    file = tmp_path / "x.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=reason):
        gsm8k(file).prompt(0)


def test_gsm8k_says_what_it_needs(examples):
    with pytest.raises(ValueError, match="needs `path`"):
        GSM8K()
    with pytest.raises(ValueError, match="needs `tokenizer`"):
        GSM8K(path="x.jsonl")
    with pytest.raises(ValueError, match="can't be read"):
        gsm8k("nowhere.jsonl").prompt(0)
    with pytest.raises(ValueError, match="of which 99 are held out"):
        gsm8k(examples, evaluation_size=99).prompt(0)


@pytest.mark.skipif(not GSM8K_TEST.is_file(), reason="the shared data folder is not here")
def test_the_real_gsm8k():
    file, every = str(GSM8K_TEST), 10**6
    task = GSM8K(path=file, evaluation_path=file, evaluation_size=every, tokenizer="byte", max_tokens=4096)
    prompts = task.evaluation()
    assert len(prompts) == 1319
    assert all(prompt.answer.replace("-", "").replace(".", "").isdecimal() for prompt in prompts)
    for prompt in prompts[:20]:
        assert play(task, prompt, lambda context, prompt=prompt: prompt.solution[0]).reward == 1.0

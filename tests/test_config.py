"""Configurations: what they refuse and how they say it, plain dicts and back, and the command line."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron import config
from raytron.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    FailureConfig,
    GuardConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    RecomputeConfig,
    RunConfig,
    ScalingConfig,
    ScheduleConfig,
    TrainConfig,
    cli,
    from_dict,
    to_dict,
)

CLASSES = [getattr(config, name) for name in config.__all__ if name.endswith("Config")]


# Plain values and back

NAMES = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=8)
VALUES = st.integers() | st.booleans() | st.floats(0, 1) | NAMES
CONFIGS = st.builds(
    PretrainConfig,
    parallel=st.builds(
        ParallelConfig, virtual_stages=st.integers(1, 3), sequence_parallel=st.booleans(), bucket_mb=st.floats(0.1, 9),
    ),
    optimizer=st.builds(OptimizerConfig, lr=st.floats(1e-6, 1), min_lr=st.just(0), weight_decay=st.floats(0, 1)),
    schedule=st.builds(
        ScheduleConfig, kind=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
        decay_steps=st.none() | st.integers(1, 9),
    ),
    recompute=st.builds(RecomputeConfig, modules=st.lists(NAMES).map(tuple)),
    guard=st.builds(
        GuardConfig, spike_factor=st.none() | st.floats(1.5, 10), tolerance=st.none() | st.floats(0, 0.5),
        suspect_factor=st.none() | st.floats(1.5, 10), agreement_interval=st.integers(0, 9),
    ),
    model=st.builds(ModelConfig, overrides=st.dictionaries(NAMES, VALUES)),
    data=st.builds(DataConfig, blend=st.lists(st.tuples(st.floats(0.1, 9), NAMES)).map(tuple), mock=st.booleans()),
    run=st.builds(RunConfig, name=NAMES, failure_config=st.builds(FailureConfig, max_failures=st.integers(-1, 3))),
    scaling=st.builds(
        ScalingConfig, num_workers=st.sampled_from([1, 2, (1, 4)]),
        resources_per_worker=st.none() | st.dictionaries(NAMES, st.floats(0, 4)),
    ),
    steps=st.integers(0, 1000),
)  # fmt: skip


@given(CONFIGS)
def test_json_gives_back_the_same_configuration(chosen):
    assert from_dict(PretrainConfig, json.loads(json.dumps(to_dict(chosen)))) == chosen


@pytest.mark.parametrize("cls", CLASSES)
def test_every_configuration_is_frozen_and_has_defaults_that_hold(cls):
    default = cls()
    assert from_dict(cls, to_dict(default)) == default
    name = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(default, name, getattr(default, name))


# What is refused

# A value no field of that type takes.
WRONG = {int: "1", float: "fast", bool: 1, str: 3}


def fields(cls, path: tuple[str, ...] = ()):
    """(path, declared type) of every field of a configuration and of those inside it."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        yield (*path, field.name), hint
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, (*path, field.name))


def wrong(hint):
    options = [h for h in typing.get_args(hint) if h is not type(None)] if typing.get_args(hint) else [hint]
    return WRONG.get(options[0], object()) if hint not in WRONG else WRONG[hint]


@pytest.mark.parametrize(
    ("path", "hint"), fields(PretrainConfig), ids=lambda value: ".".join(value) if isinstance(value, tuple) else ""
)
def test_an_ill_typed_value_is_named_wherever_it_is(path, hint):
    value = wrong(hint)
    values = value
    for name in reversed(path):
        values = {name: values}
    with pytest.raises(ValueError) as caught:
        from_dict(PretrainConfig, values)
    assert str(caught.value).startswith("config." + ".".join(path))
    assert repr(value) in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("path", [(), ("parallel",), ("run", "checkpoint_config")], ids=".".join)
def test_an_unknown_key_is_named_wherever_it_is(path):
    values = {"nonsense": 1}
    for name in reversed(path):
        values = {name: values}
    with pytest.raises(
        ValueError, match=rf"^{'.'.join(('config', *path))}: unknown key 'nonsense'; \w+Config has \w+, "
    ):
        from_dict(PretrainConfig, values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_dict(PretrainConfig, [1]), r"config is \[1\]; expected the fields of PretrainConfig"),
        (lambda: ParallelConfig(tp="2"), r"ParallelConfig.tp is '2'; expected int"),
        (lambda: ParallelConfig(tp=2.0), r"ParallelConfig.tp is 2.0; expected int"),
        (lambda: ParallelConfig(zero=1), r"ParallelConfig.zero is 1; expected bool"),
        (lambda: ParallelConfig(tp=True), r"ParallelConfig.tp is True; expected int"),
        (lambda: ScheduleConfig(kind="cos"), r"ScheduleConfig.kind is 'cos'; expected one of 'cosine', 'linear'"),
        (lambda: TrainConfig(precision="fp16"), r"TrainConfig.precision is 'fp16'; expected one of 'fp32', 'bf16'"),
        (lambda: DataConfig(blend=((1.0, "a", "b"),)), r"blend\[0\] is \(1.0, 'a', 'b'\); expected 2 values"),
        (lambda: DataConfig(blend=(("a", 1.0),)), r"DataConfig.blend\[0\]\[0\] is 'a'; expected float"),
        (lambda: ScalingConfig(num_workers="4"), r"num_workers is '4'; expected int or tuple\[int, int\]"),
        (lambda: ScalingConfig(resources_per_worker={"CPU": "x"}), r"resources_per_worker.CPU is 'x'; expected float"),
        (lambda: ModelConfig(overrides={"a": None}), r"overrides.a is None; expected int or float or bool or str"),
        (lambda: ParallelConfig(pp=0), r"parallel.pp is 0; it must be at least 1"),
        (lambda: ParallelConfig(bucket_mb=0), r"parallel.bucket_mb is 0.0; it must be positive"),
        (lambda: ParallelConfig(schedule="interleaved-1f1b"), r"interleaved-1f1b needs parallel.virtual_stages >= 2"),
        (lambda: ParallelConfig(pp=2, layers_per_stage=(3,)), r"layers_per_stage \(3,\) must name at least one layer"),
        (lambda: ParallelConfig(pp=2, layers_per_stage=(3, 0)), r"layers_per_stage \(3, 0\) must name at least one"),
        (lambda: OptimizerConfig(lr=0), r"optimizer.lr is 0.0; it must be a positive number"),
        (lambda: OptimizerConfig(lr=float("nan")), r"optimizer.lr is nan"),
        (lambda: OptimizerConfig(lr=1e-4, min_lr=1e-3), r"optimizer.min_lr 0.001 must lie between 0 and lr 0.0001"),
        (lambda: OptimizerConfig(beta2=1), r"beta1 and beta2 must lie in \[0, 1\)"),
        (lambda: OptimizerConfig(clip_grad=-1), r"optimizer: eps > 0, others >= 0"),
        (lambda: ScheduleConfig(warmup_steps=-1), r"schedule.warmup_steps must not be negative"),
        (lambda: ScheduleConfig(decay_steps=0), r"schedule.decay_steps must be positive"),
        (lambda: GuardConfig(max_consecutive_skips=0), r"guard.max_consecutive_skips must be at least 1"),
        (lambda: GuardConfig(spike_factor=1), r"guard.spike_factor must exceed 1"),
        (lambda: GuardConfig(suspect_factor=1), r"guard.suspect_factor must exceed 1"),
        (lambda: GuardConfig(suspect_factor=2, recheck=False), r"guard.suspect_factor needs guard.recheck"),
        (lambda: GuardConfig(tolerance=1), r"guard.tolerance must lie in \[0, 1\)"),
        (lambda: GuardConfig(agreement_interval=-1), r"guard.agreement_interval must not be negative"),
        (lambda: EvalConfig(interval=-1), r"evaluation.interval and batches must not be negative"),
        (lambda: FailureConfig(max_failures=-2), r"failure_config.max_failures must be -1 \(any number\), 0 or more"),
        (lambda: CheckpointConfig(num_to_keep=0), r"num_to_keep must be at least 1, or None to keep all"),
        (lambda: CheckpointConfig(interval=-5), r"checkpoint_config.interval must not be negative"),
        (lambda: CheckpointConfig(shard_mb=0), r"checkpoint_config.shard_mb is 0.0; it must be positive"),
        (lambda: RunConfig(name="a/b"), r"run.name 'a/b' must be a plain folder name"),
        (lambda: ScalingConfig(num_workers=0), r"scaling.num_workers 0 must be at least 1"),
        (lambda: ScalingConfig(num_workers=(4, 2)), r"scaling.num_workers \(4, 2\) must be at least 1, and min <= max"),
        (lambda: DataConfig(path="a", blend=((1, "b"),)), r"data.path and data.blend exclude each other"),
        (lambda: DataConfig(blend=((0, "b"),)), r"data.blend: every weight must be a positive number"),
        (lambda: DataConfig(sequence_length=0), r"data.sequence_length is 0; it must be at least 1"),
        (lambda: DataConfig(workers=0), r"data.workers is 0; it must be at least 1"),
        (lambda: TrainConfig(steps=-1), r"steps is -1; it must not be negative"),
        (lambda: TrainConfig(micro_batch_size=0), r"micro_batch_size is 0; it must be at least 1"),
        (lambda: TrainConfig(global_batch_size=8).micro_batches(3), r"global_batch_size 8 .*; use a multiple of 3"),
        (
            lambda: PretrainConfig(scaling=ScalingConfig(num_workers=3), parallel=ParallelConfig(tp=2)),
            r"scaling.num_workers 3 is not divisible by parallel tp x pp = 2 x 1; use a multiple of 2",
        ),
        (
            lambda: PretrainConfig(scaling=ScalingConfig(num_workers=3)),
            r"global_batch_size 8 is not divisible by dp x micro_batch_size = 3 x 1; use a multiple of 3",
        ),
        (
            lambda: PretrainConfig(scaling=ScalingConfig(num_workers=(1, 9))),
            r"global_batch_size 8 is 8 micro-batches of 1, too few for dp 9; use fewer ranks",
        ),
        (lambda: ParallelConfig(zero=False, twins=True), r"parallel.twins keeps .* leave parallel.twins off too"),
    ],
)  # fmt: skip
def test_bad_input_names_the_field_and_the_mend(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_means_the_same_is_taken_as_the_declared_type():
    """Integers as floats, lists as tuples, paths as strings, numbers for a union's member."""
    assert OptimizerConfig(lr=1).lr == 1.0
    assert isinstance(OptimizerConfig(lr=1).lr, float)
    assert ParallelConfig(pp=2, layers_per_stage=[1, 2]).layers_per_stage == (1, 2)
    assert RunConfig(storage_path=Path("/x/y")).storage_path == "/x/y"
    assert ScalingConfig(num_workers=[1, 2]).bounds == (1, 2)
    mixed = {"a": True, "b": 2, "c": 0.5, "d": "e"}
    assert repr(ModelConfig(overrides=mixed).overrides) == repr(mixed)
    assert hash(ParallelConfig(pp=2, layers_per_stage=[1, 2])) == hash(ParallelConfig(pp=2, layers_per_stage=(1, 2)))


def test_interleaving_is_what_1f1b_with_virtual_stages_means():
    assert ParallelConfig(virtual_stages=2).schedule == "interleaved-1f1b"


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_ranks_and_micro_batches_add_up(tp, pp, dp, micro, count):
    chosen = PretrainConfig(
        parallel=ParallelConfig(tp=tp, pp=pp), scaling=ScalingConfig(num_workers=tp * pp * dp),
        micro_batch_size=micro, global_batch_size=dp * micro * count,
    )  # fmt: skip
    assert chosen.dp() == dp
    assert chosen.micro_batches(dp) == count


def test_a_run_that_may_change_size_takes_ranks_that_do_not_divide_its_batch():
    chosen = PretrainConfig(scaling=ScalingConfig(num_workers=(1, 3)))
    assert [chosen.micro_batches(3, index, uneven=True) for index in range(3)] == [3, 3, 2]


# The command line


def test_every_field_is_a_flag_and_defaults_are_the_recipes():
    recipe = PretrainConfig(steps=7, model=ModelConfig(preset="llama-3m"), optimizer=OptimizerConfig(lr=1e-2))
    assert cli(recipe, args=[]) == recipe
    flags = (
        "--parallel.tp 2 --parallel.no-zero --parallel.schedule gpipe --scaling.num-workers 4 --optimizer.lr 1e-3 "
        "--model.overrides num_hidden_layers 4 rope_theta 0.5 tie_word_embeddings True --data.path my.jsonl "
        "--run.checkpoint-config.num-to-keep None --parallel.layers-per-stage 6 --recompute.modules mlp attention"
    )
    chosen = cli(recipe, args=flags.split())
    assert chosen.parallel == ParallelConfig(tp=2, zero=False, schedule="gpipe", layers_per_stage=(6,))
    assert (chosen.scaling.num_workers, chosen.optimizer.lr, chosen.data.path) == (4, 1e-3, "my.jsonl")
    assert chosen.model.overrides == {"num_hidden_layers": 4, "rope_theta": 0.5, "tie_word_embeddings": True}
    assert (chosen.steps, chosen.model.preset, chosen.run.checkpoint_config.num_to_keep) == (7, "llama-3m", None)
    assert chosen.recompute.modules == ("mlp", "attention")
    assert cli(recipe, args=["--scaling.num-workers", "1", "2"]).scaling.bounds == (1, 2)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--parallel.tq 2", "parallel.tq"),
        ("--parallel.tp two", "parallel.tp"),
        ("--schedule.kind cos", "schedule.kind"),
        ("--parallel.tp 0", "parallel.tp is 0; it must be at least 1"),
        ("--scaling.num-workers 3 --parallel.tp 2", "scaling.num_workers 3 is not divisible"),
    ],
)
def test_a_wrong_flag_ends_with_its_name(flags, named, capsys):
    with pytest.raises(SystemExit) as caught:
        cli(PretrainConfig(), args=flags.split())
    assert caught.value.code != 0
    output = capsys.readouterr()
    assert named in output.out + output.err

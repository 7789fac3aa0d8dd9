"""The summary of a run."""

from __future__ import annotations

from raytron.rl.report import _busy


def test_how_busy_engines_are_is_their_mean():
    shares = {
        "engine 0": {"generating": 0.5, "updating": 0.1},
        "engine 1": {"generating": 0.2},
        "trainer": {"score": 0.1, "train": 0.2},
    }
    assert _busy(shares) == "engines 40%, trainer 30%"
    shares |= {"reward model 0": {"scoring": 0.4}, "reward model 1": {"scoring": 0.1, "restarting": 0.1}}
    assert _busy(shares) == "engines 40%, reward models 30%, trainer 30%"

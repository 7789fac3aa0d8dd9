"""A page of sample episodes, step by step: what was asked, what the policy wrote, what came back, what it was worth.

One HTML file that needs nothing else: a head and one section for each step. A file that ends there is valid HTML, so a
step is added by writing it behind the others, and a run that resumes at a step cuts off what was written from there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np

from raytron.rl.types import Group, Trajectory

__all__ = ["add_transcripts"]

Decode = Callable[..., str]

_SECTION = re.compile(r'^<section id="step-(\d+)">$', re.MULTILINE)
_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Transcripts</title>
<style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 1rem auto; padding: 0 1rem; display: flex; flex-direction: column-reverse }
header { order: 1 }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
article { border: 1px solid color-mix(in srgb, currentColor 25%, transparent); border-radius: 6px; margin: .6rem 0;
  overflow: hidden }
article p { margin: 0; padding: .3rem .7rem; font-size: .85rem;
  background: color-mix(in srgb, currentColor 8%, transparent) }
pre { margin: 0; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.6 ui-monospace, monospace }
pre span { padding: .1em .25em; border-radius: 3px }
.chosen { background: color-mix(in srgb, seagreen 28%, transparent) }
.seen { background: color-mix(in srgb, darkorange 28%, transparent) }
.prompt { opacity: .75 }
.none { color: crimson }
</style>
<header><h1>Transcripts</h1><p>Newest step first. <span class="prompt">Prompt</span>,
<span class="chosen">chosen by the policy</span>, <span class="seen">observed</span>.</p></header>
"""


def add_transcripts(
    path: str | os.PathLike[str], step: int, groups: Sequence[Group], decode: Decode, samples: int = 4
) -> None:
    """Write what happened at `step` into the page, made if it is not there; this step and later ones are replaced.

    Args:
        decode: text of token ids, called with special=True (`Task.decode`).
        samples: trajectories shown, of as many groups: of each group the best and worst in turn.
    """
    file = Path(path)
    page = file.read_text(encoding="utf-8") if file.is_file() else _HEAD
    later = (found.start() for found in _SECTION.finditer(page) if int(found[1]) >= step)
    page = page[: next(later, len(page))] + _section(step, groups, decode, samples)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(file.name + ".new")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, file)


def _section(step: int, groups: Sequence[Group], decode: Decode, samples: int) -> str:
    rewards = np.concatenate([np.zeros(0), *(group.rewards for group in groups)])
    failed = sum(len(group.trajectories) for group in groups) - len(rewards)
    mean = f"mean reward {rewards.mean():.3g} of {len(rewards)}" if len(rewards) else "no rewards"
    head = f"Step {step}: {mean}" + (f", {failed} without" if failed else "")
    articles = "".join(_article(group, t, decode) for group, t in _picked(groups, samples))
    return f'<section id="step-{step}">\n<h2>{head}</h2>\n{articles}</section>\n'


def _picked(groups: Sequence[Group], samples: int) -> Iterator[tuple[Group, Trajectory]]:
    """A few trajectories: the best of one group, the worst of the next, and so on; failed ones count as the worst."""
    for i, group in enumerate([group for group in groups if group.trajectories][:samples]):
        ranked = sorted(group.trajectories, key=lambda t: -np.inf if t.reward is None else t.reward)
        yield group, ranked[-1 if i % 2 == 0 else 0]


def _article(group: Group, trajectory: Trajectory, decode: Decode) -> str:
    facts = [f"prompt {group.index}", f"{trajectory.length} tokens chosen", f"version {_versions(trajectory)}"]
    facts += ["truncated"] if trajectory.truncated else []
    facts += [f"{name} {_shown(value)}" for name, value in trajectory.info.items() if name != "error"]
    reward = f"reward {_shown(trajectory.reward)}"
    if trajectory.reward is None:
        reward = f'<span class="none">no reward: {escape(str(trajectory.info.get("error", "?")))}</span>'
    spans = "".join(
        f'<span class="{kind}">{escape(decode(ids, special=True))}</span>' for kind, ids in _pieces(trajectory)
    )
    return f"<article><p>{reward} · {escape(' · '.join(facts))}</p><pre>{spans}</pre></article>\n"


def _versions(trajectory: Trajectory) -> str:
    chosen = trajectory.versions[trajectory.chosen]
    if not len(chosen):
        return "none"
    return f"{chosen.min()}" if chosen.min() == chosen.max() else f"{chosen.min()} to {chosen.max()}"


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pieces(trajectory: Trajectory) -> Iterator[tuple[str, list[int]]]:
    """(prompt | chosen | seen, token ids), in order."""
    chosen = trajectory.chosen
    edges = [0, *(np.flatnonzero(chosen[1:] != chosen[:-1]) + 1), len(chosen)]
    for start, stop in pairwise(edges):
        if stop > start:
            kind = "chosen" if chosen[start] else "seen" if start else "prompt"
            yield kind, trajectory.tokens[start:stop].tolist()

"""What recoveries and changes really take here, in place of the policy's guesses. Pure, from a run's journal.

A cold start is a second on one machine and minutes where an image is pulled first; a move is milliseconds or seconds,
by the model. The last few of each decide, by their median: one that was slow for its own reasons changes nothing, a
cluster that has become slow is believed after a few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from raytron.actors.policy_state import Rules

__all__ = ["TELLING", "measured"]

RECENT = 5  # of each kind
STILL = ("survey", "release", "rendezvous", "move", "adopt")  # parts in which everyone stands still whatever starts
TELLING = ("recovered", "resized", "newcomers")
"""Events that costs are known from."""


def measured(rules: Rules, events: Sequence[Mapping[str, Any]]) -> Rules:
    """`rules` with the costs that `events` tell of; what they do not tell of stays a guess.

    spare_s is what recoveries took in which seats were filled, newcomers' starts apart; move_s all other recoveries and
    every change of size or shape; cold_s what newcomers took to start, and a seat to be taken then.
    """
    stalls: dict[str, list[float]] = {"spare_s": [], "move_s": []}
    starts: list[float] = []
    for event in events:
        if event["event"] == "newcomers":
            starts += [event["start_s"]] if "start_s" in event else []
        elif event["event"] in TELLING and "action" in event:
            filled = event["event"] == "recovered" and event["action"] == "replace"
            stalls["spare_s" if filled else "move_s"].append(sum(event.get(f"{part}_s", 0.0) for part in STILL))
    found = {name: median(seconds[-RECENT:]) for name, seconds in stalls.items() if seconds}
    if starts:
        found["cold_s"] = median(starts[-RECENT:]) + found.get("spare_s", rules.spare_s)
    return replace(rules, **found)

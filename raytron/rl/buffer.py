"""Which group may start, which groups make the next batch, and a journal that a crash cannot take away. Pure.

    admit() -> indices to roll out -> put(group) -> batch() -> (train) -> trained() -> admit() ...

Groups are numbered in prompt order, and batch k is the k-th `size` *kept* groups in that order. Nothing is dropped for
being late, so the data is not biased to short answers, and a run is a pure function of its groups. A group may start
when even if every undecided group before it is kept, the batch it would fall into is at most `max_staleness` versions
ahead of the weights; so no token that is trained on is older than that, measured from the oldest. With 0 that is
synchronous; with n, groups of the next n batches are under way while this one waits for its slowest.

Rejected: dropping what is too old (wastes it, and what takes long is dropped most often), and filling a batch with
whatever is finished first.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import zlib
from bisect import bisect, insort
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from raytron.rl.types import Group, Trajectory

__all__ = ["Buffer", "Journal", "from_line", "to_line"]


class Buffer:
    """Groups between rollout and training.

    Args:
        size: kept groups of a batch.
        steps: batches of the whole run; nothing is started beyond them.
        max_staleness: versions a batch's oldest token may be behind.
        keep: whether a group is worth training on (`Algorithm.keep`); groups with fewer than `least` valid trajectories
            never are.
        version: batches trained already; kept groups `put` first count as theirs.

    Groups of a journal are `put` before anything is admitted.
    """

    def __init__(
        self,
        size: int,
        steps: int,
        max_staleness: int = 0,
        keep: Callable[[Group], bool] = lambda group: True,
        *,
        least: int = 1,
        version: int = 0,
    ) -> None:
        self.size, self.steps, self.max_staleness, self.version = size, steps, max_staleness, version
        self._keep, self._least = keep, least
        self._groups: dict[int, Group] = {}  # kept ones that no batch has taken yet
        self._kept: list[int] = []  # sorted, as is `_started`
        self._started: list[int] = []
        self._rejected: set[int] = set()
        self._passed_over: dict[int, Group] = {}  # rejected ones that no batch has gone past yet
        self._end = 0  # one past the last group that is or has been under way

    @property
    def started(self) -> tuple[int, ...]:
        """Groups under way."""
        return tuple(self._started)

    @property
    def rejected(self) -> int:
        """How many groups were not kept so far."""
        return len(self._rejected)

    def admit(self) -> list[int]:
        """Groups to start now, in order; they count as under way."""
        out = []
        for index in self._free():
            batch = (bisect(self._kept, index) + bisect(self._started, index)) // self.size
            if batch >= self.steps or batch - self.version > self.max_staleness:
                break
            out.append(index)
            insort(self._started, index)
            self._end = max(self._end, index + 1)
        return out

    def _free(self) -> Iterator[int]:
        """Groups that nothing is known of: gaps that a crash has left, then all new ones."""
        if len(self._kept) + len(self._started) + len(self._rejected) < self._end:
            known = {*self._kept, *self._started, *self._rejected}
            yield from [index for index in range(self._end) if index not in known]
        yield from itertools.count(self._end)

    def put(self, group: Group) -> bool:
        """A finished group; whether it is kept. One that is known already changes nothing."""
        index = group.index
        if index in self._started:
            self._started.remove(index)
        if self._is_kept(index) or index in self._rejected:
            return self._is_kept(index)
        self._end = max(self._end, index + 1)
        if len(group.valid) >= self._least and self._keep(group):
            insort(self._kept, index)
            self._groups[index] = group
            return True
        self._rejected.add(index)
        self._passed_over[index] = group
        return False

    def _is_kept(self, index: int) -> bool:
        at = bisect(self._kept, index)
        return at > 0 and self._kept[at - 1] == index

    def batch(self) -> list[Group] | None:
        """The groups of batch `version`, once all that come before its last are decided."""
        mine = self._kept[self.version * self.size : (self.version + 1) * self.size]
        if len(mine) < self.size:
            return None
        undecided = mine[-1] + 1 - (self.version + 1) * self.size - sum(i < mine[-1] for i in self._rejected)
        return None if undecided else [self._groups[index] for index in mine]

    def passed_over(self) -> list[Group]:
        """Groups that were not kept and lie before the last of `batch()`, behind that of the batch before, in order."""
        last = self._kept[(self.version + 1) * self.size - 1]
        return [self._passed_over[index] for index in sorted(self._passed_over) if index < last]

    def trained(self) -> None:
        """Batch `version` has been trained on: the weights are one version further, its groups are let go."""
        self.version += 1
        self.forget_trained()

    def forget_trained(self) -> None:
        """Let go of the groups that batches before `version` took (after a journal was `put`).

        Raises ValueError if some of them are not known: what comes next would not be what the run left off at.
        """
        taken = self._kept[: self.version * self.size]
        if len(taken) < self.version * self.size:
            raise ValueError(
                f"the run's checkpoint is of step {self.version}, but its rollouts.jsonl holds {len(taken)} of the "
                f"{self.version * self.size} groups it was trained on; put the file back, or choose another run.name"
            )
        for index in taken:
            self._groups.pop(index, None)
        last = taken[-1] if taken else -1
        self._passed_over = {index: group for index, group in self._passed_over.items() if index > last}


class Journal:
    """Finished groups and trained steps, one checked line each, so that a run goes on after any crash.

        {"index": 7, "trajectories": [...]}        written before the group may be trained on
        {"step": 3, "groups": [12, 13, ...]}       written, with all before it made durable, before the step

    After a crash the run goes on from a checkpoint and takes recorded groups instead of rolling them out again: steps
    since the checkpoint see the same groups, so give the same weights, and none is lost or used in two steps.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._known: set[int] = set()
        self._steps: dict[int, tuple[int, ...]] = {}
        self._file: BinaryIO | None = None

    def recover(self) -> Iterator[Group]:
        """The recorded groups, in the order they were finished. To be exhausted before anything is recorded.

        Raises ValueError for a line that is damaged anywhere but at the torn end of the file, naming file and line.
        """
        whole = 0
        for line, record in self._records():
            whole += len(line)
            if not isinstance(record, Group):
                self._steps[record[0]] = record[1]
            elif record.index not in self._known:
                self._known.add(record.index)
                yield record
        if self.path.exists() and self.path.stat().st_size > whole:  # a crash cut the last line short
            os.truncate(self.path, whole)
        self._file = self.path.open("ab")

    def _records(self) -> Iterator[tuple[bytes, Group | tuple[int, tuple[int, ...]]]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield line, from_line(line)
                except ValueError as error:
                    if file.read(1):
                        raise ValueError(
                            f"{self.path}:{number}: {error}; move the file away to roll out from the checkpoint anew"
                        ) from None
                    return

    def group(self, group: Group) -> None:
        """Record a finished group."""
        if group.index not in self._known:
            self._known.add(group.index)
            self._file.write(to_line(group))
            self._file.flush()

    def step(self, step: int, groups: tuple[int, ...]) -> None:
        """Record what step `step` (from 1) is about to train on. ValueError if it has been recorded otherwise."""
        known = self._steps.setdefault(step, groups)
        if known != groups:
            raise ValueError(
                f"{self.path}: step {step} was trained on groups {known} and would now be on {groups}; the run's "
                "configuration has changed: choose another run.name, or remove the run's folder"
            )
        self._file.write(to_line((step, groups)))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()


def to_line(record: Group | tuple[int, tuple[int, ...]]) -> bytes:
    """A record as a line: JSON, a tab, its CRC-32, a newline."""
    if isinstance(record, Group):
        body: dict[str, Any] = {"index": record.index, "trajectories": [_plain(t) for t in record.trajectories]}
    else:
        body = {"step": record[0], "groups": list(record[1])}
    text = json.dumps(body, separators=(",", ":")).encode()
    return text + b"\t%08x\n" % zlib.crc32(text)


def from_line(line: bytes) -> Group | tuple[int, tuple[int, ...]]:
    """What `to_line` wrote. ValueError for anything else."""
    text, _, check = line.rpartition(b"\t")
    if not line.endswith(b"\n") or check.strip() != b"%08x" % zlib.crc32(text):
        raise ValueError("the line is damaged (its checksum does not fit)")
    body = json.loads(text)
    if "step" in body:
        return body["step"], tuple(body["groups"])
    return Group(body["index"], tuple(_trajectory(t) for t in body["trajectories"]))


_ARRAYS = {"tokens": np.int32, "chosen": np.bool_, "logprobs": np.float32, "versions": np.int32}


def _plain(trajectory: Trajectory) -> dict[str, Any]:
    arrays = {name: base64.b64encode(getattr(trajectory, name).tobytes()).decode() for name in _ARRAYS}
    rest = {name: getattr(trajectory, name) for name in ("reward", "truncated")}
    return arrays | rest | {"info": dict(trajectory.info)}


def _trajectory(plain: dict[str, Any]) -> Trajectory:
    arrays = {name: np.frombuffer(base64.b64decode(plain[name]), kind) for name, kind in _ARRAYS.items()}
    return Trajectory(**arrays, **{name: plain[name] for name in ("reward", "truncated", "info")})

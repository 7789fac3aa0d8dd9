"""Where a rank sits: pure arithmetic, no process groups.

The dense axes are dp, pp, cp, tp with tp fastest and dp slowest, so one dense replica (the *unit*, pp x cp x tp
ranks) is contiguous and can be placed, lost and replaced as a whole. Megatron-LM orders them tp-cp-ep-dp-pp; with dp
inside pp a unit would be scattered over the cluster. The expert view lays ep and etp over the same ranks: within one
pipeline stage the dp x cp x tp ranks are renumbered as edp x ep x etp, etp fastest, so experts may span units.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

__all__ = ["AXES", "Coords", "Mesh"]

AXES = ("dp", "pp", "cp", "tp")
EXPERT_AXES = ("edp", "ep", "etp")


class Coords(NamedTuple):
    """Position of a rank on the dense axes."""

    dp: int
    pp: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Mesh:
    """Sizes of the parallel axes.

    Args:
        dp, pp, cp, tp: dense axes: data, pipeline, context and tensor parallel sizes.
        ep: expert parallel size; experts are spread over ep groups of etp ranks within a stage.
        etp: tensor parallel size of an expert, by default tp.

    Raises:
        ValueError: a size below 1, or ep x etp does not divide dp x cp x tp.
    """

    dp: int = 1
    pp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int | None = None

    def __post_init__(self) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp)
        for axis in (*AXES, "ep", "etp"):
            if getattr(self, axis) < 1:
                raise ValueError(f"mesh axis {axis} is {getattr(self, axis)}; every axis needs a size of at least 1")
        if (self.dp * self.cp * self.tp) % (self.ep * self.etp):
            raise ValueError(
                f"ep x etp = {self.ep} x {self.etp} does not divide dp x cp x tp = {self.dp} x {self.cp} x {self.tp}; "
                "choose ep and etp so that their product divides the ranks of one stage"
            )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.dp * self.pp * self.cp * self.tp

    @property
    def unit(self) -> int:
        """Ranks of one dense replica, the step of size."""
        return self.pp * self.cp * self.tp

    @property
    def edp(self) -> int:
        """Replicas of each expert within a stage."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    def coords(self, rank: int) -> Coords:
        """Dense coordinates of `rank`."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is not in a mesh of {self.size} ranks")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        dp, pp = divmod(rest, self.pp)
        return Coords(dp, pp, cp, tp)

    def rank(self, dp: int = 0, pp: int = 0, cp: int = 0, tp: int = 0) -> int:
        """Rank at dense coordinates, the inverse of `coords`."""
        return ((dp * self.pp + pp) * self.cp + cp) * self.tp + tp

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """Ranks that share every other coordinate with `rank`, in the order of `axis`.

        `axis` is a dense or expert axis, "world", or several dense axes joined by "_" ("dp_cp": slowest first).
        """
        if axis == "world":
            return tuple(range(self.size))
        if axis in EXPERT_AXES:
            return self._expert_group(axis, rank)
        axes = axis.split("_")
        if unknown := [a for a in axes if a not in AXES]:
            raise ValueError(f"unknown mesh axis {unknown[0]!r}; axes are {', '.join((*AXES, *EXPERT_AXES, 'world'))}")
        here = self.coords(rank)._asdict()
        spans = product(*(range(getattr(self, a)) for a in axes))
        return tuple(self.rank(**(here | dict(zip(axes, span, strict=True)))) for span in spans)

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """All groups of `axis`; together they hold every rank once."""
        return tuple(dict.fromkeys(self.group(axis, rank) for rank in range(self.size)))

    def _expert_group(self, axis: str, rank: int) -> tuple[int, ...]:
        stage = self.coords(rank).pp
        ranks = [self.rank(dp, stage, cp, tp) for dp, cp, tp in product(*map(range, (self.dp, self.cp, self.tp)))]
        sizes = {"edp": self.edp, "ep": self.ep, "etp": self.etp}
        stride = {"edp": self.ep * self.etp, "ep": self.etp, "etp": 1}[axis]
        position = ranks.index(rank)
        first = position - position // stride % sizes[axis] * stride
        return tuple(ranks[first + i * stride] for i in range(sizes[axis]))

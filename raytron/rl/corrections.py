"""Off-policy corrections: what the policy loss of a token is multiplied by when trainer and engine disagree on it.

rho = pi_trainer / pi_engine, of one token or of a whole sequence, is held to [low, high]: the bounds are always on
trainer over engine. A correction is a level and an action:

    tis                    token       truncate   min(rho, high)              (Yao et al. 2025)
    sequence-tis           product     truncate   the sequence's rho, for each of its tokens
    icepop                 token       drop       rho inside, 0 outside       (Ling team 2025)
    mask-token             token       mask       1 inside, 0 outside
    mask-sequence          geometric   mask       by exp(mean log rho): length does not matter
    mask-sequence-product  product     mask       by prod rho, which grows with length: for short responses

Weights carry no gradient. Dropped tokens stay in the reduction's denominators: divided by the survivors alone, those
would count for more the more is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raytron.rl.surrogate import bounded_exp, sequence_mean, sequence_sum
from raytron.rl.types import Tokens

__all__ = ["CORRECTIONS", "Correction"]


@dataclass(frozen=True)
class Correction:
    """How one is made, and the bounds it has where a run names none."""

    level: Literal["token", "product", "geometric"]
    action: Literal["truncate", "drop", "mask"]
    low: float
    high: float

    @property
    def reweighs(self) -> bool:
        """Whether it multiplies by rho, rather than only leaving tokens out."""
        return self.action != "mask"

    def weights(self, log_rho_T: Tensor, tokens: Tokens, low: float, high: float) -> tuple[Tensor, Tensor]:
        """Of each token, [T]: its weight, and whether rho was out of bounds (bool)."""
        levels = {"token": lambda x_T, _: x_T, "product": sequence_sum, "geometric": sequence_mean}
        rho_T = bounded_exp(levels[self.level](log_rho_T.detach(), tokens))
        outside_T = (rho_T < low) | (rho_T > high)
        if self.action == "truncate":
            return rho_T.clamp(low, high), outside_T
        kept_T = rho_T if self.action == "drop" else torch.ones_like(rho_T)
        return kept_T.masked_fill(outside_T, 0.0), outside_T


# Bounds: TIS as in verl and slime, icepop and mask-token as in Ling's paper, the product's as in TRL.
CORRECTIONS: dict[str, Correction] = {
    "tis": Correction("token", "truncate", 0.0, 2.0),
    "sequence-tis": Correction("product", "truncate", 0.0, 5.0),
    "icepop": Correction("token", "drop", 0.5, 5.0),
    "mask-token": Correction("token", "mask", 0.5, 5.0),
    "mask-sequence": Correction("geometric", "mask", 0.99, 1.01),
    "mask-sequence-product": Correction("product", "mask", 0.0, 3.0),
}

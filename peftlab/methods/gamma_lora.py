"""γ-LoRA."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

from torch import Tensor

from peftlab.errors import require
from peftlab.method import LowRank, check_positive, check_rank, normal
from peftlab.sites import Site


class GammaLoRA(LowRank):
    """γ-LoRA: Conner 2025, "Parameter Efficient Fine Tuning Ideas", boosted learning rate of B.

        W' = W + (gamma alpha / √rank) B A          A [rank, d_in], B [d_out, rank] per site

    The random factor is drawn γ times smaller and the product multiplied by γ: the function and
    its distribution at step 0 do not depend on γ, but under Adam the random factor moves γ times
    faster relative to its size (under SGD γ²). Equal to AdamW at γ = 1 in which the random
    factor's group has lr·γ, ε/γ and weight decay/γ.

    Init: the random factor N(0, 1/gamma²), the other 0, so W' = W at step 0.
    Trainable:
        per site: rank * (d_in + d_out)
    Differs from the paper: the text draws the factor at the output and zeroes the one at the
    input; its code does the opposite. `random_factor` offers both, A (the code's) by default.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        rank: int,
        alpha: float,
        gamma: float,
        random_factor: str,
        dropout: float,
    ) -> None:
        super().__init__(sites, dropout=dropout)
        check_rank(sites, rank=rank)
        check_positive(alpha=alpha, gamma=gamma)
        require(random_factor in ("A", "B"), "method.random_factor", random_factor, "A or B")
        a, b = (1 / gamma, 0.0) if random_factor == "A" else (0.0, 1 / gamma)
        self.own("A", lambda s: normal(rank, s.d_in, std=a))
        self.own("B", lambda s: normal(s.d_out, rank, std=b))
        self.scale = gamma * alpha / math.sqrt(rank)

    def factors(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Down = A, up = (gamma alpha / √rank) B."""
        return t.A, self.scale * t.B

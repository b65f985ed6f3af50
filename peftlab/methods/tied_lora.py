"""Tied-LoRA."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from peftlab.method import (
    LowRank,
    check_positive,
    check_rank,
    check_switch,
    constant,
    normal,
    rms,
)
from peftlab.sites import Site


class TiedLoRA(LowRank):
    """Tied-LoRA: Renduchintala, Konuk and Kuchaiev 2023, arXiv:2311.09578, eq. 2.

        W' = W + s diag(v) B diag(u) A          A [rank, d_in], B [d_out, rank] tied per group
                                                u [rank], v [d_out] per site

    s = gamma^(1 + u + v) alpha ν / √rank, one γ for each factor that is not 0 at the start
    (Conner 2025); ν = RMS of the site's frozen W, stored. `u` and `v` may be left out.

    Init: A N(0, 1/gamma²), B = 0, u = v = 1/gamma, so W' = W at step 0.
    Trainable:
        per group: rank * (d_in + d_out)
        per site: u * rank + v * d_out
    Differs from the paper: the scale and the γ boost are Conner's; all seven linears, not only
    the fused q, k, v. Differs from Conner's code: `mid` follows its own switch and γ's exponent
    counts the factors that are there (both were wrong).
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
        u: bool,
        v: bool,
        dropout: float,
    ) -> None:
        super().__init__(sites, dropout=dropout)
        check_rank(sites, rank=rank)
        check_positive(alpha=alpha, gamma=gamma)
        check_switch(u=u, v=v)
        self.tied("A", lambda s: normal(rank, s.d_in, std=1 / gamma))
        self.tied("B", lambda s: torch.zeros(s.d_out, rank))
        if u:
            self.own("u", lambda s: constant(rank, value=1 / gamma))
        if v:
            self.own("v", lambda s: constant(s.d_out, value=1 / gamma))
        self.fixed("nu", lambda s: rms(s.module.weight))
        self.scale = gamma ** (1 + u + v) * alpha / math.sqrt(rank)
        self.has_u, self.has_v = u, v

    def factors(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Down = diag(u) A, up = s diag(v) B."""
        down = t.u[:, None] * t.A if self.has_u else t.A
        up = t.v[:, None] * t.B if self.has_v else t.B
        return down, self.scale * t.nu * up

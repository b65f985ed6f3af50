"""Partially Tied LoRA."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from peftlab.method import (
    LowRank,
    check_count,
    check_positive,
    check_rank,
    check_switch,
    constant,
    normal,
    rms,
)
from peftlab.sites import Site


class PartiallyTiedLoRA(LowRank):
    """Partially Tied LoRA: Conner 2025, "Parameter Efficient Fine Tuning Ideas".

        W' = W + s diag(post) B diag(mid) A diag(pre)
        A = Σ_λ w_A[λ] L_A[λ]          L_A [l_a, rank, d_in] tied per group, w_A [l_a] per site
        B = Σ_μ w_B[μ] L_B[μ]          L_B [l_b, d_out, rank] tied per group, w_B [l_b] per site

    Each site selects its factors from a tied space of l_a (l_b) matrices; optional vectors per
    site: pre [d_in], mid [rank], post [d_out]. s = gamma^(3 + pre + mid + post) alpha ν /
    √(rank l_a l_b), one γ for each factor that is not 0 at the start; ν = RMS of the site's
    frozen W, stored.

    Init: L_A, w_A, w_B N(0, 1/gamma²), L_B = 0, vectors 1/gamma, so W' = W at step 0.
    Trainable:
        per group: rank * (l_a * d_in + l_b * d_out)
        per site: l_a + l_b + pre * d_in + mid * rank + post * d_out
    Differs from the paper: nothing.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        rank: int,
        l_a: int,
        l_b: int,
        alpha: float,
        gamma: float,
        pre: bool,
        mid: bool,
        post: bool,
        dropout: float,
    ) -> None:
        super().__init__(sites, dropout=dropout)
        check_rank(sites, rank=rank)
        check_count(l_a=l_a, l_b=l_b)
        check_positive(alpha=alpha, gamma=gamma)
        check_switch(pre=pre, mid=mid, post=post)
        self.tied("L_A", lambda s: normal(l_a, rank, s.d_in, std=1 / gamma))
        self.tied("L_B", lambda s: torch.zeros(l_b, s.d_out, rank))
        self.own("w_A", lambda s: normal(l_a, std=1 / gamma))
        self.own("w_B", lambda s: normal(l_b, std=1 / gamma))
        if pre:
            self.own("pre", lambda s: constant(s.d_in, value=1 / gamma))
        if mid:
            self.own("mid", lambda s: constant(rank, value=1 / gamma))
        if post:
            self.own("post", lambda s: constant(s.d_out, value=1 / gamma))
        self.fixed("nu", lambda s: rms(s.module.weight))
        boost = gamma ** (3 + pre + mid + post)
        self.scale = boost * alpha / math.sqrt(rank * l_a * l_b)
        self.has_pre, self.has_mid, self.has_post = pre, mid, post

    def factors(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Down = diag(mid) A diag(pre), up = s diag(post) B."""
        down = torch.einsum("l,lri->ri", t.w_A, t.L_A)
        up = torch.einsum("l,lor->or", t.w_B, t.L_B)
        if self.has_pre:
            down = down * t.pre
        if self.has_mid:
            down = t.mid[:, None] * down
        if self.has_post:
            up = t.post[:, None] * up
        return down, self.scale * t.nu * up

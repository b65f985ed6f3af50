"""Tied LoRA Extra."""

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


class TiedLoRAExtra(LowRank):
    """Tied LoRA Extra: Conner 2025, "Parameter Efficient Fine Tuning Ideas".

        W' = W + s diag(post) B M A diag(pre)          A [r_1, d_in], B [d_out, r_2] tied per group
                                                       M [r_2, r_1] per site

    Optional vectors per site: pre [d_in], post [d_out]. s = gamma^(2 + pre + post) alpha ν /
    √(r_1 r_2), one γ for each factor that is not 0 at the start; ν = RMS of the site's frozen
    W, stored.

    Init: A, M N(0, 1/gamma²), B = 0, vectors 1/gamma, so W' = W at step 0.
    Trainable:
        per group: r_1 * d_in + r_2 * d_out
        per site: r_1 * r_2 + pre * d_in + post * d_out
    Differs from the paper: nothing.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        r_1: int,
        r_2: int,
        alpha: float,
        gamma: float,
        pre: bool,
        post: bool,
        dropout: float,
    ) -> None:
        super().__init__(sites, dropout=dropout)
        check_rank(sites, r_1=r_1, r_2=r_2)
        check_positive(alpha=alpha, gamma=gamma)
        check_switch(pre=pre, post=post)
        self.tied("A", lambda s: normal(r_1, s.d_in, std=1 / gamma))
        self.tied("B", lambda s: torch.zeros(s.d_out, r_2))
        self.own("M", lambda s: normal(r_2, r_1, std=1 / gamma))
        if pre:
            self.own("pre", lambda s: constant(s.d_in, value=1 / gamma))
        if post:
            self.own("post", lambda s: constant(s.d_out, value=1 / gamma))
        self.fixed("nu", lambda s: rms(s.module.weight))
        self.scale = gamma ** (2 + pre + post) * alpha / math.sqrt(r_1 * r_2)
        self.has_pre, self.has_post = pre, post

    def factors(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Down = M A diag(pre), up = s diag(post) B."""
        down = t.M @ t.A
        if self.has_pre:
            down = down * t.pre
        up = t.post[:, None] * t.B if self.has_post else t.B
        return down, self.scale * t.nu * up

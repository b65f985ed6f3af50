"""Tensor Embedding Adaptation."""

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


class TensorEmbedding(LowRank):
    """Tensor Embedding Adaptation: Conner 2025, "Parameter Efficient Fine Tuning Ideas".

        W' = W + s diag(post) B M A diag(pre)          A [r_1, d_in], B [d_out, r_2] tied per group
        M = Σ_λ w[λ] T[λ]              T [l_1, r_2, r_1] tied per group, w [l_1] per site

    A Tucker decomposition of the change of all sites of a group, stacked to [sites, d_out, d_in].
    Optional vectors per site: pre [d_in], post [d_out]. s = gamma^(3 + pre + post) alpha ν /
    √(r_1 r_2 l_1), one γ for each factor that is not 0 at the start; ν = RMS of the site's
    frozen W, stored.

    Init: A, T, w N(0, 1/gamma²), B = 0, vectors 1/gamma, so W' = W at step 0.
    Trainable:
        per group: r_1 * d_in + r_2 * d_out + l_1 * r_1 * r_2
        per site: l_1 + pre * d_in + post * d_out
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
        l_1: int,
        alpha: float,
        gamma: float,
        pre: bool,
        post: bool,
        dropout: float,
    ) -> None:
        super().__init__(sites, dropout=dropout)
        check_rank(sites, r_1=r_1, r_2=r_2)
        check_count(l_1=l_1)
        check_positive(alpha=alpha, gamma=gamma)
        check_switch(pre=pre, post=post)
        self.tied("A", lambda s: normal(r_1, s.d_in, std=1 / gamma))
        self.tied("B", lambda s: torch.zeros(s.d_out, r_2))
        self.tied("T", lambda s: normal(l_1, r_2, r_1, std=1 / gamma))
        self.own("w", lambda s: normal(l_1, std=1 / gamma))
        if pre:
            self.own("pre", lambda s: constant(s.d_in, value=1 / gamma))
        if post:
            self.own("post", lambda s: constant(s.d_out, value=1 / gamma))
        self.fixed("nu", lambda s: rms(s.module.weight))
        self.scale = gamma ** (3 + pre + post) * alpha / math.sqrt(r_1 * r_2 * l_1)
        self.has_pre, self.has_post = pre, post

    def factors(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Down = M A diag(pre), up = s diag(post) B."""
        down = torch.einsum("l,lba->ba", t.w, t.T) @ t.A
        if self.has_pre:
            down = down * t.pre
        up = t.post[:, None] * t.B if self.has_post else t.B
        return down, self.scale * t.nu * up

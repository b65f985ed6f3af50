"""Simple DoRA."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from peftlab.gain import gained
from peftlab.method import (
    WeightMethod,
    check_positive,
    check_rank,
    constant,
    dropout_of,
    full_precision,
    normal,
)
from peftlab.peft_form import PeftForm, lora_form
from peftlab.sites import Site
from peftlab.thin import add_thin_


class SimpleDoRA(WeightMethod):
    """Simple DoRA: Conner 2025, "Parameter Efficient Fine Tuning Ideas".

        W' = diag(beta n m) (W⁰ + s B A)          A [rank, d_in], B [d_out, rank], m [d_out]
        W⁰ = diag(1/n) W, n = RMS of each row of W, a constant          s = gamma alpha / √rank

    DoRA without the norm of the sum: W⁰ has rows of unit size, the magnitude beta n m is trained
    freely, and the product B A is never formed. beta boosts the learning rate of m.

    Init: A N(0, 1/gamma²), B = 0, m = 1/beta, so W' = W at step 0.
    Trainable:
        per site: rank * (d_in + d_out) + d_out
    Differs from the paper: the text divides by the Euclidean norm, its code, followed here, by
    the RMS (√d_in smaller); the text's main formula prints W where it means W⁰.
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
        beta: float,
        dropout: float,
    ) -> None:
        super().__init__(sites)
        check_rank(sites, rank=rank)
        check_positive(alpha=alpha, gamma=gamma, beta=beta)
        self.own("A", lambda s: normal(rank, s.d_in, std=1 / gamma))
        self.own("B", lambda s: torch.zeros(s.d_out, rank))
        self.own("m", lambda s: constant(s.d_out, value=1 / beta))
        self.fixed("n", lambda s: s.module.weight.float().square().mean(1).sqrt())
        self.scale = gamma * alpha / math.sqrt(rank)
        self.beta = beta
        self.drop = dropout_of(dropout)

    def weight(self, t: SimpleNamespace, W: Tensor) -> Tensor:
        """W' = diag(beta m) W + diag(beta n m) s B A, the same map without 0/0 for a zero row."""
        gain = self.beta * t.m
        return gain[:, None] * W + (gain * t.n * self.scale)[:, None] * t.B @ t.A

    def forward(self, t: SimpleNamespace, site: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        """Y' = y + (beta m - 1)(y - b) + diag(beta n m) s B A x."""
        with full_precision(x):
            gain = self.beta * t.m
            up = (gain * t.n * self.scale)[:, None] * t.B
        return add_thin_(gained(y, gain - 1, site.bias), self.drop(x), t.A, up)

    def peft_form(self, backbone: nn.Module) -> PeftForm:
        """LoRA with use_dora: its rows have the norms of those of W'.

        W' = diag(m_p / ‖V‖) V by rows, V = W + diag(n) s B A, m_p = beta m ‖V‖.
        """
        factors, magnitudes = [], []
        for site, t in zip(self.sites, self.tensors, strict=True):
            up = (t.n * self.scale)[:, None] * t.B
            factors.append((t.A, up))
            magnitudes.append(self.beta * t.m * (site.module.weight.float() + up @ t.A).norm(dim=1))
        return lora_form(self.sites, factors, magnitudes)

"""DoRA."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.gain import gained
from peftlab.method import (
    WeightMethod,
    check_positive,
    check_rank,
    check_switch,
    dropout_of,
    full_precision,
    kaiming,
)
from peftlab.peft_form import PeftForm, lora_form
from peftlab.products import product
from peftlab.sites import Site
from peftlab.thin import add_thin_


class DoRA(WeightMethod):
    """DoRA: Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3.

        W' = diag(m / n) (W + s B A)          A [rank, d_in], B [d_out, rank], m [d_out] per site
        n = ‖W + s B A‖, the Euclidean norm of each row [d_out]          s = alpha / rank

    Init: A Kaiming uniform, B = 0, m = ‖W‖ by rows, so W' = W at step 0.
    Trainable:
        per site: rank * (d_in + d_out) + d_out
    Differs from the paper: nothing. `detach_norm` treats n as a constant in backward (section
    4.3, as the authors' and Hugging Face's code do); false is eq. 5 with its whole gradient.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        rank: int,
        alpha: float,
        detach_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__(sites)
        check_rank(sites, rank=rank)
        check_positive(alpha=alpha)
        check_switch(detach_norm=detach_norm)
        self.own("A", lambda s: kaiming(rank, s.d_in))
        self.own("B", lambda s: torch.zeros(s.d_out, rank))
        self.own("m", lambda s: s.module.weight.float().norm(dim=1))
        self.fixed("square", lambda s: s.module.weight.float().square().sum(1), stored=False)
        self.scale = alpha / rank
        self.detach_norm = detach_norm
        self.drop = dropout_of(dropout)

    def weight(self, t: SimpleNamespace, W: Tensor) -> Tensor:
        """W' = diag(m / n) (W + s B A)."""
        V = W + self.scale * t.B @ t.A
        n = V.norm(dim=1)
        return (t.m / (n.detach() if self.detach_norm else n))[:, None] * V

    def forward(self, t: SimpleNamespace, site: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        """Y' = y + (m/n - 1)(y - b) + diag(m/n) s B A x: in bf16 the small change keeps its digits.

        With dropout the whole change, norm included, sees the dropped input, as in peft.
        """
        with full_precision(x):
            gain = t.m / self.norm(t, site.weight)
            up = (gain * self.scale)[:, None] * t.B
        if self.drop.p and self.training:
            x = self.drop(x)
            y = y + (gain - 1).to(y.dtype) * F.linear(x, site.weight)
        else:
            y = gained(y, gain - 1, site.bias)
        return add_thin_(y, x, t.A, up)

    def norm(self, t: SimpleNamespace, W: Tensor) -> Tensor:
        """N [d_out] without forming B A.

        ‖W + s B A‖² = ‖W‖² + ⟨2 s W Aᵀ + s² B A Aᵀ, B⟩ by rows, all of width r.
        """
        A, B = (t.A.detach(), t.B.detach()) if self.detach_norm else (t.A, t.B)
        cross = product(W.to(A.dtype), A.T)
        change = torch.addmm(cross, B, A @ A.T, beta=2 * self.scale, alpha=self.scale**2)
        return (t.square + (change * B).sum(1)).sqrt()

    def peft_form(self, backbone: nn.Module) -> PeftForm:
        """LoRA with use_dora: A, s B, m."""
        factors = [(t.A, self.scale * t.B) for t in self.tensors]
        return lora_form(self.sites, factors, [t.m for t in self.tensors])

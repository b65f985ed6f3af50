"""SVDoRA."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.method import WeightMethod, check_positive, check_rank, full_precision, normal
from peftlab.sites import Site


class SVDoRA(WeightMethod):
    """SVDoRA: Conner 2025, code of "Parameter Efficient Fine Tuning Ideas", `svdora`.

        W' = (P + s_out B_out A_out) diag(σ) (Q + s_in B_in A_in)
        W = P diag(σ) Q, its singular value decomposition, k = min(d_in, d_out), P and Q frozen
        A_in [r_u, d_in], B_in [k, r_u], σ [k], A_out [r_v, k], B_out [d_out, r_v] per site
        s_in = gamma alpha / √(r_u k), s_out = gamma alpha / √(r_v k)

    Init: A_in, A_out N(0, 1/gamma²), B_in = B_out = 0, σ the singular values, so W' = W at step 0
    up to the rounding of the decomposition.
    Trainable:
        per site: r_u * (d_in + k) + k + r_v * (k + d_out)
    Differs from the paper: nothing. P and Q are stored with the adapter: a decomposition computed
    elsewhere may have other signs.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(
        self, sites: Sequence[Site], *, r_u: int, r_v: int, alpha: float, gamma: float
    ) -> None:
        super().__init__(sites)
        check_rank(sites, r_u=r_u, r_v=r_v)
        check_positive(alpha=alpha, gamma=gamma)
        svd = {
            s.name: torch.linalg.svd(s.module.weight.float(), full_matrices=False) for s in sites
        }
        self.own("A_in", lambda s: normal(r_u, s.d_in, std=1 / gamma))
        self.own("B_in", lambda s: torch.zeros(min(s.d_in, s.d_out), r_u))
        self.own("sigma", lambda s: svd[s.name][1])
        self.own("A_out", lambda s: normal(r_v, min(s.d_in, s.d_out), std=1 / gamma))
        self.own("B_out", lambda s: torch.zeros(s.d_out, r_v))
        self.fixed("P", lambda s: svd[s.name][0])
        self.fixed("Q", lambda s: svd[s.name][2])
        self.s_in = gamma * alpha / math.sqrt(r_u)
        self.s_out = gamma * alpha / math.sqrt(r_v)

    def weight(self, t: SimpleNamespace, W: Tensor) -> Tensor:
        """W' = (P + s_out B_out A_out) diag(σ) (Q + s_in B_in A_in)."""
        root_k = math.sqrt(t.sigma.numel())
        right = t.Q + self.s_in / root_k * t.B_in @ t.A_in
        left = t.P + self.s_out / root_k * t.B_out @ t.A_out
        return left @ (t.sigma[:, None] * right)

    def forward(self, t: SimpleNamespace, site: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        """Z = diag(σ)(Q x + s_in B_in A_in x), y' = P z + s_out B_out A_out z + b."""
        root_k = math.sqrt(t.sigma.numel())
        with full_precision(x):
            into = t.sigma[:, None] * t.Q
            up_in = (t.sigma * (self.s_in / root_k))[:, None] * t.B_in
            up_out = self.s_out / root_k * t.B_out
        z = F.linear(x, into) + F.linear(F.linear(x, t.A_in), up_in)
        return F.linear(z, t.P, site.bias) + F.linear(F.linear(z, t.A_out), up_out)

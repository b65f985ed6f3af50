"""PiSSA."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from peftlab.method import LowRank, check_positive, check_rank
from peftlab.sites import Site


class PiSSA(LowRank):
    """PiSSA: Meng, Wang and Zhang 2024, arXiv:2404.02948, eq. 2-4.

        W' = W - s B₀ A₀ + s B A          A [rank, d_in], B [d_out, rank] per site, s = alpha / rank

    The adapter starts as the principal part of W and the residual W - s B₀ A₀ is what is frozen.

    Init: W = U diag(σ) Vᵀ in float32, B = B₀ = U_r √(σ_r / s), A = A₀ = √(σ_r / s) V_rᵀ,
    so W' = W at step 0.
    Trainable:
        per site: rank * (d_in + d_out)
    Differs from the paper: W itself stays in the backbone and B₀ A₀ is subtracted by two constant
    factors, stored with the adapter. The function and its gradients are the same; nothing is lost
    when W is bf16, where rounding the residual would break the identity.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(self, sites: Sequence[Site], *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(sites, dropout=dropout)
        check_rank(sites, rank=rank)
        check_positive(alpha=alpha)
        self.scale = alpha / rank
        principal = {s.name: _principal(s.module.weight, rank, self.scale) for s in sites}
        self.own("A", lambda s: principal[s.name][0])
        self.own("B", lambda s: principal[s.name][1])
        self.fixed("A0", lambda s: principal[s.name][0].clone())
        self.fixed("B0", lambda s: principal[s.name][1].clone())

    def factors(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Down = [A; A₀] [2 rank, d_in], up = s [B, -B₀] [d_out, 2 rank]."""
        return torch.cat((t.A, t.A0)), self.scale * torch.cat((t.B, -t.B0), dim=1)


def _principal(W: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Factors A [rank, d_in] and B [d_out, rank] with scale · B A the best rank-r part of W."""
    U, sigma, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    root = (sigma[:rank] / scale).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root

"""LoRA."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from peftlab.method import LowRank, check_positive, check_rank, kaiming
from peftlab.sites import Site


class LoRA(LowRank):
    """LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3.

        W' = W + (alpha / rank) B A          A [rank, d_in], B [d_out, rank] per site

    Init: A Kaiming uniform, U(-1/√d_in, 1/√d_in); B = 0, so W' = W at step 0.
    Trainable:
        per site: rank * (d_in + d_out)
    Differs from the paper: A is uniform, as in the authors' code, not Gaussian.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(self, sites: Sequence[Site], *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(sites, dropout=dropout)
        check_rank(sites, rank=rank)
        check_positive(alpha=alpha)
        self.own("A", lambda s: kaiming(rank, s.d_in))
        self.own("B", lambda s: torch.zeros(s.d_out, rank))
        self.scale = alpha / rank

    def factors(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Down = A, up = (alpha / rank) B."""
        return t.A, self.scale * t.B

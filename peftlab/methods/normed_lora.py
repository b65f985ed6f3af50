"""Normed LoRA."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from peftlab.method import LowRank, check_positive, check_rank, normal, rms
from peftlab.sites import Site


class NormedLoRA(LowRank):
    """Normed LoRA: Conner 2025, code of "Parameter Efficient Fine Tuning Ideas", `normed_lora`.

        W' = W + (gamma alpha ν / √rank) B A          A [rank, d_in], B [d_out, rank] per site

    ν = RMS of the entries of the site's frozen W, so alpha · lr is the change of a weight in one
    Adam step relative to the size of the weights. ν is stored: after a merge it is lost.

    Init: A N(0, 1/gamma²), B = 0, so W' = W at step 0.
    Trainable:
        per site: rank * (d_in + d_out)
    Differs from the paper: nothing.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(
        self, sites: Sequence[Site], *, rank: int, alpha: float, gamma: float, dropout: float
    ) -> None:
        super().__init__(sites, dropout=dropout)
        check_rank(sites, rank=rank)
        check_positive(alpha=alpha, gamma=gamma)
        self.own("A", lambda s: normal(rank, s.d_in, std=1 / gamma))
        self.own("B", lambda s: torch.zeros(s.d_out, rank))
        self.fixed("nu", lambda s: rms(s.module.weight))
        self.scale = gamma * alpha / math.sqrt(rank)

    def factors(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Down = A, up = (gamma alpha ν / √rank) B."""
        return t.A, self.scale * t.nu * t.B

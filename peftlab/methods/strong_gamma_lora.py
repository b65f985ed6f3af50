"""Strong γ-LoRA."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from peftlab.method import LowRank, check_positive, check_rank, normal, rms
from peftlab.sites import Site


class StrongGammaLoRA(LowRank):
    """Strong γ-LoRA: Conner 2025, code of the PEFT ideas, `strong_gamma_lora`.

        W' = W + min(gamma, 1 / RMS(B)) (alpha / √rank) B A     A [rank, d_in], B [d_out, rank]

    Once RMS(B) > 1/γ the update is normalised in B: its scale no longer matters to the forward
    pass. The minimum is a constant in backward, so B's own norm drifts.

    Init: A N(0, 1/gamma²), B = 0 (1/RMS is infinite, the minimum is γ), so W' = W at step 0.
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
        self.gamma = gamma
        self.scale = alpha / math.sqrt(rank)

    def factors(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Down = A, up = min(gamma, 1 / RMS(B)) (alpha / √rank) B."""
        boost = (1 / rms(t.B.detach())).clamp(max=self.gamma)  # 1/0 = inf, so γ at step 0
        return t.A, self.scale * boost * t.B

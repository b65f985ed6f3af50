"""rsLoRA."""

import math
from collections.abc import Sequence

from peftlab.methods.lora import LoRA
from peftlab.sites import Site


class RsLoRA(LoRA):
    """rsLoRA (rank-stabilised LoRA): Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2.

        W' = W + (alpha / √rank) B A          A [rank, d_in], B [d_out, rank] per site

    Init: as LoRA: A Kaiming uniform, B = 0, so W' = W at step 0.
    Trainable:
        per site: rank * (d_in + d_out)
    Differs from the paper: nothing.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(self, sites: Sequence[Site], *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(sites, rank=rank, alpha=alpha, dropout=dropout)
        self.scale = alpha / math.sqrt(rank)

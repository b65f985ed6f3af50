"""LoKr."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from peftlab.method import check_count, check_positive, kaiming
from peftlab.methods.krona import Kronecker, check_factor
from peftlab.peft_form import PeftForm, kronecker_form
from peftlab.sites import Site
from peftlab.sizes import is_thin, kron_sizes


class LoKr(Kronecker):
    """LoKr: Yeh et al. 2023, arXiv:2309.14859, section 3.

        W' = W + (alpha / rank) W1 ⊗ W2          W1 [o_1, i_1], W2 [o_2, i_2] per site

    d_out = o_1 o_2 and d_in = i_1 i_2, split at `factor` where that divides, otherwise at the
    largest divisor that exceeds neither `factor` nor the square root. W2 is a product of rank
    `rank`, W2a [o_2, rank] W2b [rank, i_2], unless 2 rank >= max(o_2, i_2): then it is full. One
    tensor holds it either way: W2, or W2aᵀ and W2b side by side, [rank, o_2 + i_2].

    Init: W1 = 0, so W' = W at step 0; W2, W2a and W2b Kaiming uniform, U(-1/√fan_in, 1/√fan_in).
    Trainable:
        per site: o_1 * i_1 + w_2
            where o_1, o_2 = split(d_out, factor)
            where i_1, i_2 = split(d_in, factor)
            where w_2 = rank * (o_2 + i_2) if 2 * rank < max(o_2, i_2) else o_2 * i_2
    Differs from the paper: nothing; as Hugging Face's code with its defaults (LyCORIS zeroes W2b
    instead of W1). W1 is never itself a product (`decompose_both`), and there is no dropout.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(self, sites: Sequence[Site], *, rank: int, alpha: float, factor: int) -> None:
        super().__init__(sites)
        check_count(rank=rank)
        check_positive(alpha=alpha)
        check_factor(factor=factor)

        def sizes(s: Site) -> tuple[int, int, int, int]:
            return kron_sizes(s.d_out, s.d_in, factor, factor)

        def second(s: Site) -> Tensor:
            o_2, i_2 = sizes(s)[2:]
            if not is_thin(rank, o_2, i_2):
                return kaiming(o_2, i_2)
            return torch.cat([kaiming(o_2, rank).T, kaiming(rank, i_2)], dim=1)

        self.own("W1", lambda s: torch.zeros(sizes(s)[:2]))
        self.own("W2", second)
        for site, t in zip(self.sites, self.tensors, strict=True):
            t.o_2, t.i_2 = sizes(site)[2:]
        self.rank = rank
        self.scale = alpha / rank

    def pair(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Return (alpha / rank) W1, W2."""
        W2 = self.second(t)
        return self.scale * t.W1, W2 if isinstance(W2, Tensor) else W2[0] @ W2[1]

    def second(self, t: SimpleNamespace) -> Tensor | tuple[Tensor, Tensor]:
        """Return W2, or W2a and W2b."""
        if not is_thin(self.rank, t.o_2, t.i_2):
            return t.W2
        W2a, W2b = t.W2.split((t.o_2, t.i_2), dim=1)
        return W2a.T, W2b

    def peft_form(self, backbone: nn.Module) -> PeftForm:
        """LOKR, with W2a and W2b where W2 is their product."""
        pairs = [(self.scale * t.W1, self.second(t)) for t in self.tensors]
        return kronecker_form(self.sites, pairs, self.rank)

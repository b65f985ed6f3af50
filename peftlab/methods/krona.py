"""KronA."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.errors import require
from peftlab.method import WeightMethod, check_positive, full_precision, normal
from peftlab.peft_form import PeftForm, kronecker_form
from peftlab.sites import Site
from peftlab.sizes import kron_sizes


class Kronecker(WeightMethod):
    """W' = W + A ⊗ B. A subclass states only `pair`."""

    def pair(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Return A [a_out, a_in] and B [d_out / a_out, d_in / a_in], float32, scaled."""
        raise NotImplementedError

    def weight(self, t: SimpleNamespace, W: Tensor) -> Tensor:
        """W' = W + A ⊗ B."""
        return W + torch.kron(*self.pair(t))

    def forward(self, t: SimpleNamespace, site: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        """Y' = y + vec(A X Bᵀ), X = x laid out by rows as [a_in, d_in / a_in]; never A ⊗ B."""
        with full_precision(x):
            A, B = self.pair(t)
        X = x.unflatten(-1, (A.shape[1], B.shape[1]))
        Y = F.linear(F.linear(X, B).mT, A).mT  # [..., a_out, d_out / a_out]
        return y + Y.flatten(-2)

    def peft_form(self, backbone: nn.Module) -> PeftForm:
        """LOKR."""
        return kronecker_form(self.sites, [self.pair(t) for t in self.tensors])


def check_factor(**factors: int) -> None:
    """Require each to be -1, which leaves the choice to the width, or a whole number from 1."""
    for name, factor in factors.items():
        whole = isinstance(factor, int) and not isinstance(factor, bool)
        allowed = "-1 (a divisor near the square root), or a whole number of at least 1"
        require(whole and (factor == -1 or factor >= 1), f"method.{name}", factor, allowed)


class KronA(Kronecker):
    """KronA: Edalati et al. 2022, arXiv:2212.10650, section 4.

        W' = W + scale A ⊗ B          A [a_2, a_1], B [d_out / a_2, d_in / a_1] per site

    The rank of the change is rank A · rank B, up to full. a_1 divides every d_in and a_2 every
    d_out; -1 takes, per site, the largest divisor that does not exceed the square root. The
    forward pass applies the factors one after the other and never forms the product.

    Init: A normal with variance 1 / a_1, which keeps the size of x; B = 0, so W' = W at step 0.
    Trainable:
        per site: a_2 * a_1 + b_2 * b_1
            where a_2, b_2 = split(d_out, a_2)
            where a_1, b_1 = split(d_in, a_1)
    Differs from the paper: matrices are [out, in], the transpose of the paper's. Its variance of A
    was not to be had. Its variants beside the MLP, which cannot be merged, are left out.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(self, sites: Sequence[Site], *, a_1: int, a_2: int, scale: float) -> None:
        super().__init__(sites)
        check_positive(scale=scale)
        check_factor(a_1=a_1, a_2=a_2)
        for site in sites:
            for name, size, d in (("a_1", a_1, site.d_in), ("a_2", a_2, site.d_out)):
                fits = size == -1 or d % size == 0
                require(fits, f"method.{name}", size, f"-1, or a divisor of {d} ({site.name})")

        def sizes(s: Site) -> tuple[int, int, int, int]:
            return kron_sizes(s.d_out, s.d_in, a_2, a_1)

        self.own("A", lambda s: normal(*sizes(s)[:2], std=sizes(s)[1] ** -0.5))
        self.own("B", lambda s: torch.zeros(sizes(s)[2:]))
        self.scale = scale

    def pair(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Return scale A, B."""
        return self.scale * t.A, t.B

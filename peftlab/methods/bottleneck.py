"""The bottleneck adapter: what Houlsby's, Pfeiffer's and the parallel one have in common."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.errors import require
from peftlab.method import SiteMethod, check_count
from peftlab.sites import Site

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu, "tanh": torch.tanh}


class Bottleneck(SiteMethod):
    """A(z) = U φ(D z + b_D) + b_U per site, z of the width d_out: as narrow as `bottleneck`.

    D is made by `down`; U and both biases start at 0, so A = 0 at step 0. A subclass states in
    `place` at which module the adapter acts, and in `forward` how.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        kinds: Sequence[str],
        bottleneck: int,
        activation: str,
        down: Callable[[int, int], Tensor],
    ) -> None:
        super().__init__(sites)
        for site in sites:
            allowed = f"this adapter belongs to the kind {' or '.join(kinds)}"
            require(site.kind in kinds, "method.sites", site.kind, allowed)
        check_count(bottleneck=bottleneck)
        known = f"one of {', '.join(ACTIVATIONS)}"
        require(activation in ACTIVATIONS, "method.activation", activation, known)
        self.phi = ACTIVATIONS[activation]
        self.own("D", lambda s: down(bottleneck, s.d_out))
        self.own("b_D", lambda s: torch.zeros(bottleneck))
        self.own("U", lambda s: torch.zeros(s.d_out, bottleneck))
        self.own("b_U", lambda s: torch.zeros(s.d_out))

    def adapter(self, t: SimpleNamespace, z: Tensor) -> Tensor:
        """Return U φ(D z + b_D) + b_U, of the shape of z [..., d_out]."""
        return F.linear(self.phi(F.linear(z, t.D, t.b_D)), t.U, t.b_U)


def cut_normal(*shape: int, std: float) -> Tensor:
    """N(0, std²), drawn again where it falls beyond two std."""
    return nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std)

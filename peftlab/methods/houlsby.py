"""Houlsby's adapters."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

from torch import Tensor, nn

from peftlab.method import check_positive
from peftlab.methods.bottleneck import Bottleneck, cut_normal
from peftlab.sites import Site


class Houlsby(Bottleneck):
    """Houlsby adapter: Houlsby et al. 2019, arXiv:1902.00751, section 2.1.

        y' = y + U φ(D y + b_D) + b_U          y [..., d_out] a sublayer's output, φ the activation
        D [bottleneck, d_out], b_D [bottleneck], U [d_out, bottleneck], b_U [d_out] per site

    Two adapters in series per layer: after attention's output projection and after the MLP's down
    projection, both before the residual is added.

    Init: D N(0, std²) cut at two std; U = b_D = b_U = 0, so y' = y at step 0.
    Trainable:
        per site: 2 * bottleneck * d_out + bottleneck + d_out
    Differs from the paper: U starts at 0, not near it; the layer norms stay frozen. Where the
    backbone normalises a sublayer's output too (Gemma 2 and 3), the adapter stands before that.
    Merge: no: its non-linearity is in no weight.
    Family: additive.
    """

    def __init__(
        self, sites: Sequence[Site], *, bottleneck: int, activation: str, std: float
    ) -> None:
        check_positive(std=std)
        super().__init__(
            sites,
            kinds=("o", "down"),
            bottleneck=bottleneck,
            activation=activation,
            down=partial(cut_normal, std=std),
        )

    def forward(self, t: SimpleNamespace, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Y' = y + U φ(D y + b_D) + b_U."""
        return y + self.adapter(t, y)

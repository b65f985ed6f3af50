"""AdaMix over adapters."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

from torch import Tensor, nn

from peftlab.method import check_positive
from peftlab.methods.bottleneck import Bottleneck, cut_normal
from peftlab.methods.mixture import Mixture, check_consistency
from peftlab.sites import Site


class AdaMix(Mixture, Bottleneck):
    """AdaMix: Wang et al. 2022, arXiv:2205.12410, section 3.

        y' = y + U_j φ(D_i y + b_D,i) + b_U,j          y [..., d_out] the MLP's output
        i in 1..experts_down, j in 1..experts_up, drawn per site and forward pass of a whole batch
        D_i [bottleneck, d_out], b_D,i [bottleneck], U_j [d_out, bottleneck], b_U,j [d_out] per site
        objective = nats(p) + consistency (KL(p, q) + KL(q, p)) / 2 per target, p and q the
        predictions of two forward passes, each with draws of its own

    A mixture of adapters that costs no more than one of them once it is trained: evaluation, file
    and use take the average of the D_i and of the U_j. A step takes two passes, and consistency: 0
    only one.

    Init: all D_i are the same N(0, std²) cut at two std, and the draws make them differ;
    U = b_D = b_U = 0, so y' = y at step 0.
    Trainable:
        per site: experts_down * bottleneck * (d_out + 1) + experts_up * d_out * (bottleneck + 1)
    Differs from the paper: U starts at 0, not near it. A step moves the experts that it did not
    draw too, by Adam's momentum.
    Merge: no: its non-linearity is in no weight.
    Family: additive.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        bottleneck: int,
        experts_down: int,
        experts_up: int,
        consistency: float,
        activation: str,
        std: float,
    ) -> None:
        check_positive(std=std)
        super().__init__(
            sites,
            kinds=("o", "down"),
            bottleneck=bottleneck,
            activation=activation,
            down=partial(cut_normal, std=std),
        )
        self.consistency = check_consistency(consistency)
        self.multiply("D", "b_D", experts_down=experts_down)
        self.multiply("U", "b_U", experts_up=experts_up)

    def forward(self, t: SimpleNamespace, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Y' = y + U φ(D y + b_D) + b_U of the experts that are drawn, or of their average."""
        return y + self.adapter(self.routed(t), y)

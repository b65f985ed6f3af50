"""The scaled parallel adapter."""

from collections.abc import Sequence
from types import SimpleNamespace

from torch import Tensor, nn

from peftlab.errors import InputError
from peftlab.method import check_positive, kaiming
from peftlab.methods.bottleneck import Bottleneck
from peftlab.sites import Site


class ParallelAdapter(Bottleneck):
    """Parallel adapter: He et al. 2021, arXiv:2110.04366, table 1 (scaled PA).

        y' = y + scale (U φ(D x + b_D) + b_U)          x, y [..., d_out] input and output of the MLP
        D [bottleneck, d_out], b_D [bottleneck], U [d_out, bottleneck], b_U [d_out] per site

    One adapter per layer, beside the MLP: it sees what the MLP sees, the normalised residual
    stream. φ is the activation.

    Init: D Kaiming uniform, U(-1/√d_out, 1/√d_out); U = b_D = b_U = 0, so y' = y at step 0.
    Trainable:
        per site: 2 * bottleneck * d_out + bottleneck + d_out
    Differs from the paper: its models have the norm after the MLP, so that x is the residual stream
    itself; here the norm comes first, and x is its output. scale is not trained.
    Merge: no: its non-linearity is in no weight.
    Family: additive.
    """

    def __init__(
        self, sites: Sequence[Site], *, bottleneck: int, activation: str, scale: float
    ) -> None:
        check_positive(scale=scale)
        super().__init__(
            sites, kinds=("down",), bottleneck=bottleneck, activation=activation, down=kaiming
        )
        self.scale = scale

    def place(self, backbone: nn.Module, site: Site) -> nn.Module:
        """Return the MLP, the module that holds the down projection.

        Raises: InputError if that is the layer itself, as in OPT: its input is not the MLP's.
        """
        name = site.name.rpartition(".")[0]
        if name.rpartition(".")[2].isdecimal():
            raise InputError(f"method.sites={site.name}: this model's MLP is no module of its own")
        return backbone.get_submodule(name)

    def forward(self, t: SimpleNamespace, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Y' = y + scale (U φ(D x + b_D) + b_U)."""
        return y + self.scale * self.adapter(t, x)

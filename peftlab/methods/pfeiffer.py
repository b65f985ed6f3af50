"""Pfeiffer's single adapter per layer."""

import re
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

from torch import Tensor, nn

from peftlab.errors import InputError
from peftlab.method import check_positive, check_switch
from peftlab.methods.bottleneck import Bottleneck, cut_normal
from peftlab.sites import Site


class Pfeiffer(Bottleneck):
    """Pfeiffer adapter: Pfeiffer et al. 2020, arXiv:2005.00247, appendix A.

        h' = h + U φ(D z + b_D) + b_U          h [..., d_out] a layer's output, φ the activation
        z = h, the MLP's output plus the residual stream; the MLP's output alone if not
        input_with_residual
        D [bottleneck, d_out], b_D [bottleneck], U [d_out, bottleneck], b_U [d_out] per site

    One adapter per layer, after the MLP; its skip connection carries the MLP's output, so that the
    residual stream is added once.

    Init: D N(0, std²) cut at two std; U = b_D = b_U = 0, so h' = h at step 0.
    Trainable:
        per site: 2 * bottleneck * d_out + bottleneck + d_out
    Differs from the paper: U starts at 0, not near it. The order of norm and residual is that of a
    decoder with the norm first, as in the library AdapterHub. Where the backbone also normalises
    the MLP's output (Gemma 2 and 3), z holds the normalised output with the residual, the bare one
    without.
    Merge: no: its non-linearity is in no weight.
    Family: additive.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        bottleneck: int,
        activation: str,
        std: float,
        input_with_residual: bool,
    ) -> None:
        check_positive(std=std)
        check_switch(input_with_residual=input_with_residual)
        super().__init__(
            sites,
            kinds=("down",),
            bottleneck=bottleneck,
            activation=activation,
            down=partial(cut_normal, std=std),
        )
        self.input_with_residual = input_with_residual

    def place(self, backbone: nn.Module, site: Site) -> nn.Module:
        """Return the layer, whose output is that of the MLP plus the residual stream; or the MLP's.

        Raises: InputError if the layer is wanted and the site stands in none.
        """
        return backbone.get_submodule(layer_of(site)) if self.input_with_residual else site.module

    def forward(self, t: SimpleNamespace, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Y' = y + U φ(D y + b_D) + b_U, y the layer's output or the MLP's alone."""
        return y + self.adapter(t, y)


def layer_of(site: Site) -> str:
    """Name of the decoder layer that holds the site: "model.layers.3". Raises: InputError."""
    found = re.match(r".*\.\d+(?=\.)", site.name)
    if found is None:
        raise InputError(
            f"method.sites={site.name}: the site stands in no numbered layer, which "
            "input_with_residual=true needs"
        )
    return found.group()

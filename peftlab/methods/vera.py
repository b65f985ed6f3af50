"""VeRA."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from peftlab.errors import require
from peftlab.method import LowRank, constant
from peftlab.peft_form import PeftForm, at
from peftlab.sites import Site


class VeRA(LowRank):
    """VeRA: Kopiczko, Blankevoort and Asano 2023, arXiv:2310.11454, eq. 2.

        W' = W + diag(b) B diag(d) A          A [rank, d_in], B [d_out, rank] frozen, for all sites
                                              d [rank], b [d_out] per site

    One frozen random pair of the size of the largest site serves all: a site takes the first d_in
    columns of A and the first d_out rows of B.

    Init: A, B Kaiming uniform (gain √2), d = d_initial, b = 0, so W' = W at step 0.
    Trainable:
        per site: rank + d_out
    Differs from the paper: nothing. The pair is stored with the adapter, since random numbers
    differ between versions of torch.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(
        self, sites: Sequence[Site], *, rank: int, d_initial: float, dropout: float
    ) -> None:
        super().__init__(sites, dropout=dropout)
        require(isinstance(rank, int) and rank >= 1, "method.rank", rank, "a whole number from 1")
        device = sites[0].module.weight.device
        shape_A = (rank, max(s.d_in for s in sites))
        shape_B = (max(s.d_out for s in sites), rank)
        self.A = nn.Buffer(nn.init.kaiming_uniform_(torch.empty(shape_A)).to(device))
        self.B = nn.Buffer(nn.init.kaiming_uniform_(torch.empty(shape_B)).to(device))
        for site, t in zip(self.sites, self.tensors, strict=True):
            t.d_in = site.d_in
        self.own("d", lambda s: constant(rank, value=d_initial))
        self.own("b", lambda s: torch.zeros(s.d_out))

    def factors(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Down = diag(d) A, up = diag(b) B."""
        A, B = self.A[:, : t.d_in], self.B[: t.b.numel()]
        return t.d[:, None] * A, t.b[:, None] * B

    def peft_form(self, backbone: nn.Module) -> PeftForm:
        """VERA, with the random pair."""
        tensors: dict[str, Tensor] = {"base_model.vera_A": self.A, "base_model.vera_B": self.B}
        for site, t in zip(self.sites, self.tensors, strict=True):
            tensors[at(site.name, "vera_lambda_d")] = t.d
            tensors[at(site.name, "vera_lambda_b")] = t.b
        config = {
            "peft_type": "VERA",
            "target_modules": [site.name for site in self.sites],
            "r": len(self.A),
            "save_projection": True,
            "fan_in_fan_out": False,
        }
        return PeftForm(config, tensors)

"""BitFit."""

from collections.abc import Sequence

import torch
from torch import nn

from peftlab.errors import require
from peftlab.method import check_switch
from peftlab.methods.layernorm import norms as norms_of
from peftlab.selected import SelectMethod
from peftlab.sites import Site


class BitFit(SelectMethod):
    """BitFit: Ben Zaken, Goldberg and Ravfogel 2021, arXiv:2106.10199, section 3.

        y' = W x + b'          b' [d_out] per site, W frozen; β' [d] per LayerNorm

    Trained are the biases of the sites and, with `norms`, those of all LayerNorms (n_norm_biases
    numbers). Llama, Gemma and their like have no biases: `create` gives each site without one a
    zero bias, which is a part of the merged model.

    Init: the backbone's own biases; a created one is 0, so y' = y at step 0.
    Trainable:
        per site: d_out * (biased or create)
        per model: norms * n_norm_biases
    Differs from the paper: no task head is trained. Created biases are T-Few's way to use BitFit
    on a bias-free model (arXiv:2205.05638).
    Merge: in place.
    Family: selective.
    """

    def __init__(self, sites: Sequence[Site], *, norms: bool, create: bool) -> None:
        super().__init__(sites)
        check_switch(norms=norms, create=create)
        require(
            create or any(s.module.bias is not None for s in sites),
            "method.create",
            str(create).lower(),
            "true for this model, none of whose sites has a bias to train",
        )
        self.norms, self.create = norms, create
        self.created: list[Site] = []

    def hook(self, backbone: nn.Module) -> None:
        """Unfreeze the biases, after creating those that are wanted and missing."""
        if self.create:
            self.created = [s for s in self.sites if s.module.bias is None]
            for site in self.created:
                zeros = torch.zeros(site.d_out, device=site.module.weight.device)
                site.module.bias = nn.Parameter(zeros)
        self.owners = {s.name for s in self.sites}
        if self.norms:
            self.owners.update(norms_of(backbone))
        super().hook(backbone)

    def selects(self, name: str, p: nn.Parameter) -> bool:
        """Whether it is a bias of a site, or of a norm if those are wanted."""
        owner, _, last = name.rpartition(".")
        return last == "bias" and owner in self.owners

    def unhook(self, backbone: nn.Module) -> None:
        """Take the created biases off again."""
        for site in self.created:
            site.module.register_parameter("bias", None)
        self.created = []
        super().unhook(backbone)

    def merge(self, backbone: nn.Module) -> None:
        """Leave the created biases to the backbone and detach."""
        self.created = []
        super().merge(backbone)

"""(IA)³."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.gain import gained
from peftlab.method import WeightMethod, full_precision
from peftlab.peft_form import PeftForm, at
from peftlab.sites import Site


class IA3(WeightMethod):
    """(IA)³: Liu et al. 2022, arXiv:2205.05638, section 3.3.

        W' = diag(l) W or, for kind down, W diag(l)          l [n_rows] or [d_in] per site

    l_k and l_v scale the outputs of k and v, bias included, and l_ff the input of down, which is
    the MLP's hidden state. Where q, k and v are one layer, only the rows of k and v are scaled:
    n_rows is d_out otherwise. Any further kind in `sites` has its output scaled.

    Init: l = 1, so W' = W at step 0.
    Trainable:
        per site: d_in if kind == "down" else n_rows
    Differs from the paper: nothing in the model; its two extra losses, which are for multiple
    choice, are left out.
    Merge: exact.
    Family: additive.
    """

    parts = True

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites)
        self.own("l", lambda s: torch.ones(s.d_in if s.kind == "down" else s.n_rows))
        self.fixed("scaled", _scaled, stored=False)
        for site, t in zip(self.sites, self.tensors, strict=True):
            t.on_input = site.kind == "down"

    def gain(self, t: SimpleNamespace) -> Tensor:
        """L - 1 [d_out], [d_in] for kind down: 0 for rows that are not the site's."""
        return torch.zeros_like(t.scaled).masked_scatter(t.scaled > 0, t.l - 1)

    def weight(self, t: SimpleNamespace, W: Tensor) -> Tensor:
        """W' = diag(l) W or W diag(l)."""
        gain = self.gain(t)
        return W + W * (gain if t.on_input else gain[:, None])

    def bias(self, t: SimpleNamespace, b: Tensor) -> Tensor:
        """B' = l b where outputs are scaled."""
        return b if t.on_input else b + b * self.gain(t)

    def forward(self, t: SimpleNamespace, site: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        """Y' = y + (l - 1) y, or y + W ((l - 1) x): in bf16 the small change keeps its digits."""
        with full_precision(x):
            gain = self.gain(t)
        if t.on_input:
            return y + F.linear(gain.to(x.dtype) * x, site.weight)
        return gained(y, gain)

    def peft_form(self, backbone: nn.Module) -> PeftForm:
        """IA3; peft scales all rows of a layer: those that are not the site's by 1."""
        tensors = {}
        for site, t in zip(self.sites, self.tensors, strict=True):
            gain = 1 + self.gain(t)
            tensors[at(site.name, "ia3_l")] = gain[None] if t.on_input else gain[:, None]
        config = {
            "peft_type": "IA3",
            "target_modules": [site.name for site in self.sites],
            "feedforward_modules": [site.name for site in self.sites if site.kind == "down"],
            "fan_in_fan_out": False,
        }
        return PeftForm(config, tensors)


def _scaled(site: Site) -> Tensor:
    """1 for what l scales, 0 for the rows that are not the site's."""
    if site.kind == "down":
        return torch.ones(site.d_in)
    if site.rows is None:
        return torch.ones(site.d_out)
    return torch.zeros(site.d_out).index_fill(0, torch.tensor(site.rows), 1.0)

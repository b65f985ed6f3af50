"""DID."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from peftlab import fastfood
from peftlab.method import WeightMethod, check_count
from peftlab.sites import Site


class DID(WeightMethod):
    """DID: Li et al. 2018, arXiv:1804.08838, eq. 2.

        W' = W + P z          z [dimension] one for the model, P z [d_out d_in] laid out by rows

    Every site has its own fixed random map P, by Fastfood:

        P z = (H G Π H B z)[: D] / (√D |G|)          D = d_out d_in, n = 2^⌈log2 D⌉

    with z padded to n, H [n, n] the un-normalised Walsh-Hadamard matrix, B random signs, Π a
    permutation, G [n] ~ N(0, 1): |P z| is |z| on average, at every site. The smallest dimension
    that reaches 90 % of full fine-tuning is the task's intrinsic dimension.

    P is held as 8 bytes for each of the n numbers of a site, and a dense W' until backward: few
    parameters, but no memory is saved. The file holds z and a seed, from which torch's generator
    on the CPU draws every P again.

    Init: z = 0, so W' = W at step 0.
    Trainable:
        per model: dimension
    Differs from the paper: linear layers only; biases, norms and embeddings stay.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(self, sites: Sequence[Site], *, dimension: int) -> None:
        super().__init__(sites)
        most = min(fastfood.padded(s.d_out * s.d_in) for s in sites)
        check_count(most=most, dimension=dimension)
        device = sites[0].module.weight.device
        self.z = nn.Parameter(torch.zeros(dimension, device=device))
        self.seed = nn.Buffer(torch.randint(2**62, (), device="cpu").to(device))
        self.H = nn.Buffer(fastfood.hadamard(fastfood.RADIX).to(device), persistent=False)
        self.fixed("B", lambda s: torch.empty(dimension, dtype=torch.int8), stored=False)
        self.fixed("pi", lambda s: torch.empty(_n(s), dtype=torch.int32), stored=False)
        self.fixed("G", lambda s: torch.empty(_n(s)), stored=False)
        self.loaded()

    def loaded(self) -> None:
        """Draw the map of every site from the seed."""
        if self.seed.is_meta:  # shapes only
            return
        generator = torch.Generator().manual_seed(int(self.seed))
        for site, t in zip(self.sites, self.tensors, strict=True):
            drawn = fastfood.draw(len(self.z), site.d_out * site.d_in, generator)
            for name, tensor in drawn._asdict().items():
                getattr(t, name).copy_(tensor)

    def change(self, t: SimpleNamespace, W: Tensor) -> Tensor:
        """P z, in the shape of W."""
        parts = fastfood.Map(t.B, t.pi, t.G)
        return fastfood.apply(self.z, parts, self.H, W.numel()).view_as(W)

    def weight(self, t: SimpleNamespace, W: Tensor) -> Tensor:
        """W' = W + P z."""
        return W + self.change(t, W)


def _n(site: Site) -> int:
    return fastfood.padded(site.d_out * site.d_in)

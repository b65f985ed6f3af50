"""Prefix tuning."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftlab.cached_prefix import cached
from peftlab.method import check_count, check_positive, kaiming, normal
from peftlab.peft_form import PeftForm
from peftlab.prompts import PrefixMethod, drawn_tokens
from peftlab.sites import Site

COMMON = 5000  # tokens of the start are among so many first ids, which stand for common words
MLP = ("K0", "V0", "E", "D", "b", "U", "c")  # what is there only to make K and V


class PrefixTuning(PrefixMethod):
    """Prefix tuning: Li and Liang 2021, arXiv:2101.00190, section 4.

        y' = softmax(q [K; k]ᵀ / √h) [V; v]          K, V [length, d_kv] per site, all key heads
        [K, V] = [K₀, V₀] + tanh(E Dᵀ + b) Uᵀ + c    U [2 d_kv, hidden], c [2 d_kv] per site
        E [length, d_out], D [hidden, d_out], b [hidden] tied

    Every token attends to `length` more keys and values in every layer; d_kv is the width of all
    key heads. While training, an MLP makes what is added to their start, K₀ and V₀; afterwards only
    K and V are kept. Without it (hidden null) they are trained themselves.

    Init: K = K₀, V = V₀: what the model itself makes of `length` tokens drawn from its vocabulary.
    E N(0, std²), D Kaiming uniform, U = b = c = 0. It is not the identity at step 0: the tokens
    attend to the prefix.
    Trainable:
        per group: length * d_out + hidden * (d_out + 1) if hidden else 0
        per site: 2 * d_kv * (hidden + 1 if hidden else length)
    Differs from the paper: the tokens keep their positions. It starts at activations only without
    the MLP, which else starts at random: on a small model that costs bits that short training does
    not win back.
    Merge: no: it adds positions to attend to, and changes no weight.
    Family: additive.
    """

    def __init__(
        self, sites: Sequence[Site], *, length: int, hidden: int | None, std: float
    ) -> None:
        super().__init__(sites)
        check_count(length=length)
        check_positive(std=std)
        self.length = self.n_positions = length
        self.seed = torch.initial_seed()  # of the tokens that `hook` draws
        self.started = False
        if hidden is None:
            self.own("K", lambda s: torch.zeros(length, s.d_kv))
            self.own("V", lambda s: torch.zeros(length, s.d_kv))
            return
        check_count(hidden=hidden)
        self.fixed("K0", lambda s: torch.zeros(length, s.d_kv))
        self.fixed("V0", lambda s: torch.zeros(length, s.d_kv))
        self.tied("E", lambda s: normal(length, s.d_out, std=std))
        self.tied("D", lambda s: kaiming(hidden, s.d_out))
        self.tied("b", lambda s: torch.zeros(hidden))
        self.own("U", lambda s: torch.zeros(2 * s.d_kv, hidden))
        self.own("c", lambda s: torch.zeros(2 * s.d_kv))

    def hook(self, backbone: nn.Module) -> None:
        """Give K and V their start, the first time: only here is there a model that makes them."""
        if not self.started:
            ids = drawn_tokens(backbone, self.length, COMMON, self.seed)
            for t, (K, V) in zip(self.tensors, self.states(backbone, ids), strict=True):
                with torch.no_grad():
                    (t.K if "K" in self.keys else t.K0).copy_(K)
                    (t.V if "K" in self.keys else t.V0).copy_(V)
            self.started = True
        super().hook(backbone)

    def kv(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """K, V = K₀, V₀ + tanh(E Dᵀ + b) Uᵀ + c, or what is trained or kept."""
        if "K" in self.keys:
            return t.K, t.V
        K, V = F.linear(torch.tanh(F.linear(t.E, t.D, t.b)), t.U, t.c).chunk(2, dim=-1)
        return t.K0 + K, t.V0 + V

    @torch.no_grad()
    def compact(self) -> None:
        """Keep K and V, and drop the MLP that made them."""
        if "K" in self.keys:
            return
        made = {s.name: self.kv(t) for s, t in zip(self.sites, self.tensors, strict=True)}
        self.own("K", lambda s: made[s.name][0])
        self.own("V", lambda s: made[s.name][1])
        self.discard(*MLP)

    def peft_form(self, backbone: nn.Module) -> PeftForm:
        """PREFIX_TUNING, where the model's positions are rotations."""
        return cached(self, cast(PreTrainedModel, backbone))

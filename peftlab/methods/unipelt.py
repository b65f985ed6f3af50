"""UniPELT."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.method import (
    Method,
    SiteMethod,
    check_positive,
    check_rank,
    full_precision,
    kaiming,
    normal,
)
from peftlab.methods.pfeiffer import Pfeiffer
from peftlab.methods.prefix_tuning import PrefixTuning
from peftlab.sites import Site
from peftlab.stack import Stack


class UniPELT(Stack):
    """UniPELT: Mao et al. 2021, arXiv:2110.07577, section 3.

        g = σ(w_g x + b_g) for each token          w_g [1, d], b_g [1] per site, x a part's input
        q' = q + g B A x, and so for v             A [rank, d_in], B [n_rows, rank] per site
        y' = softmax(q [g K; k]ᵀ / √h) [g V; v]    K, V [length, d_kv], as in prefix_tuning
        h' = h + g (U φ(D z + b_D) + b_U)          D [bottleneck, d_out], U [d_out, bottleneck], z
                                                   and both b as in pfeiffer

    LoRA, a prefix and an adapter after the MLP, each with a gate by which every token decides how
    much of it it takes. The gate stands in place of LoRA's alpha / rank. Kind o in `sites` brings
    the prefix, kind down the adapter, each other kind a LoRA; what is not named is left out.

    Init: w_g and D N(0, std²), D cut at two std; b_g = 0, so that each gate is about ½; A Kaiming
    uniform, U(-1/√d_in, 1/√d_in); B = U = b_D = b_U = 0. The prefix starts as in prefix_tuning,
    prefix_std being its std: it is not the identity at step 0, as its keys take their share of the
    softmax.
    Trainable:
        per group: length * d_out + hidden * (d_out + 1) if kind == "o" and hidden else 0
        per site: 2 * d_kv * (hidden + 1 if hidden else length) + d_out + 1 if kind == "o" else 0
        per site: 2 * bottleneck * d_out + bottleneck + 2 * d_out + 1 if kind == "down" else 0
        per site: 0 if kind in ("o", "down") else rank * (d_in + n_rows) + d_in + 1
    Differs from the paper: a gate is each token's own, not its mean over the sequence, which would
    tell a causal model of the tokens to come. Where q, k and v are one layer, q and v share A and
    the gate. U starts at 0, not near it.
    Merge: no: the gates depend on the input.
    Family: hybrid.
    """

    identity = False
    parts = True

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        length: int,
        hidden: int | None,
        prefix_std: float,
        bottleneck: int,
        activation: str,
        input_with_residual: bool,
        rank: int,
        std: float,
    ) -> None:
        check_positive(prefix_std=prefix_std, std=std)
        attentions = [s for s in sites if s.kind == "o"]
        mlps = [s for s in sites if s.kind == "down"]
        weights = [s for s in sites if s.kind not in ("o", "down")]
        members: list[Method] = []
        if attentions:
            prefix = GatedPrefix(attentions, length=length, hidden=hidden, std=prefix_std)
            prefix.add_gate(std, lambda s: s.d_out)
            members.append(prefix)
        if mlps:
            adapter = GatedPfeiffer(
                mlps,
                bottleneck=bottleneck,
                activation=activation,
                std=std,
                input_with_residual=input_with_residual,
            )
            adapter.add_gate(std, lambda s: s.d_out)
            members.append(adapter)
        if weights:
            lora = GatedLoRA(weights, rank=rank)
            lora.add_gate(std, lambda s: s.d_in)
            members.append(lora)
        super().__init__(sites, members)


class Gated(SiteMethod):
    """A gate per site: one number in (0, 1) for each token, out of what the token brings itself."""

    def add_gate(self, std: float, width: Callable[[Site], int]) -> None:
        """Declare the gate, for an input of so many numbers; it starts about ½."""
        self.own("w_g", lambda s: normal(1, width(s), std=std))
        self.own("b_g", lambda s: torch.zeros(1))

    def opening(self, t: SimpleNamespace, x: Tensor) -> Tensor:
        """Map x [..., d] to σ(w_g x + b_g) [..., 1]."""
        return torch.sigmoid(F.linear(x, t.w_g, t.b_g))


class GatedPrefix(Gated, PrefixTuning):
    """The prefix: a token's gate multiplies K and V as this token sees them."""

    def gate(self, t: SimpleNamespace, x: Tensor) -> Tensor:
        """Return g [B, T]."""
        return self.opening(t, x).squeeze(-1)


class GatedPfeiffer(Gated, Pfeiffer):
    """The adapter after the MLP."""

    def forward(self, t: SimpleNamespace, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """H' = h + g (U φ(D h + b_D) + b_U)."""
        return y + self.opening(t, y) * self.adapter(t, y)


class GatedLoRA(Gated):
    """LoRA on a layer, or on a site's rows of it."""

    parts = True

    def __init__(self, sites: Sequence[Site], *, rank: int) -> None:
        super().__init__(sites)
        check_rank(sites, rank=rank)
        self.own("A", lambda s: kaiming(rank, s.d_in))
        self.own("B", lambda s: torch.zeros(s.n_rows, rank))
        self.fixed("rows", lambda s: torch.tensor(s.rows or range(s.d_out)), stored=False)

    def forward(self, t: SimpleNamespace, site: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        """Y' = y + g B A x in the site's rows."""
        with full_precision(x):  # B with rows of zeros where the layer's rows are not the site's
            up = t.B.new_zeros(site.out_features, t.B.shape[1]).index_copy(0, t.rows, t.B)
        return y + self.opening(t, x) * F.linear(F.linear(x, t.A), up)

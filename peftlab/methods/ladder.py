"""Ladder-side tuning."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.errors import require
from peftlab.method import check_count, check_positive, check_switch
from peftlab.side import SideMethod, documents
from peftlab.sites import Site

MLP_RATIO = 4  # width of a side block's MLP, over that of the block: GPT-2's


class SideBlock(nn.Module):
    """A causal transformer block of width w, norm first, without biases."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm_1 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.norm_2 = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, MLP_RATIO * width, bias=False)
        self.down = nn.Linear(MLP_RATIO * width, width, bias=False)

    def forward(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """Map z [B, T, w]; mask [B, 1, T, T] is True where a token sees one, None = the past."""
        qkv = self.qkv(self.norm_1(z)).unflatten(-1, (3, -1, self.head_width))  # [B, T, 3, H, w/H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        z = z + self.o(seen.transpose(1, 2).flatten(2))
        return z + self.down(F.gelu(self.up(self.norm_2(z))))


class Ladder(SideMethod):
    """Ladder-side tuning: Sung, Cho and Bansal 2022, arXiv:2206.06522, section 3.

        z_i = Block_i(g_i z_i-1 + (1 - g_i) (D_i h_i + c_i))          g_i = σ(α_i / temperature)
        z_0 = D_0 h_0 + c_0, h_i [..., d_out] the output of the backbone's block i, h_0 embeddings
        h' = h + U norm(z_L) + b_U, h the backbone's last hidden state, normalised; no h without
        residual
        D_i [w, d_out], c_i [w], α_i a number per block; U [d_out, w], b_U [d_out];
        w = d_out / reduction

    A small transformer beside the frozen one, whose head turns h' into logits. Nothing is
    propagated back through the backbone, and none of its activations but the h_i are kept.
    Block: causal attention and an MLP of width 4 w with GELU, each behind a norm, no biases. It has
    no code of positions: the h_i carry the backbone's.

    Init: D_i and the blocks U(-1/√n, 1/√n) for n inputs; α_i = 0, so g_i = 1/2; U = c_i = b_U = 0,
    so h' = h at step 0. Without residual it is not the identity: a small U drawn as D_i replaces
    what the backbone knows.
    Trainable:
        per site: w * d_out + 12 * w**2 + 3 * w + 1
            where w = d_out // reduction
        per model: 2 * w * n_hidden + 2 * w + n_hidden
            where w = n_hidden // reduction
    Differs from the paper: There the side network's output replaces the backbone's
    (residual: false) and starts near uniform predictions: three epochs of 64 rows left SmolLM2 at
    9.1 bits per token; frozen it has 4.3, and with residual it came to 3.4. Side weights are
    random, not cut out of the backbone's, and every block has its side block.
    Merge: no: it is a network of its own.
    Family: additive.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        reduction: int,
        head_width: int,
        temperature: float,
        residual: bool,
    ) -> None:
        super().__init__(sites)
        check_count(reduction=reduction, head_width=head_width)
        check_positive(temperature=temperature)
        check_switch(residual=residual)
        width = self.width // reduction
        fits = self.width % reduction == 0
        require(fits, "method.reduction", reduction, f"a divisor of the width {self.width}")
        fits = width % head_width == 0
        allowed = f"a divisor of the side network's width {width}"
        require(fits, "method.head_width", head_width, allowed)
        self.identity = self.residual = residual
        self.temperature = temperature
        with sites[0].module.weight.device:
            self.embed = nn.Linear(self.width, width)  # D_0
            self.rungs = nn.ModuleList(nn.Linear(self.width, width) for _ in sites)  # D_1 ... D_L
            self.blocks = nn.ModuleList(SideBlock(width, head_width) for _ in sites)
            self.alpha = nn.Parameter(torch.zeros(len(sites)))
            self.norm = nn.LayerNorm(width, bias=False)
            self.U = nn.Linear(width, self.width)
        for name, p in self.named_parameters():
            if name.endswith("bias") or (residual and name == "U.weight"):
                nn.init.zeros_(p)

    def gates(self) -> Tensor:
        """Return g_1 ... g_L, each in (0, 1)."""
        return torch.sigmoid(self.alpha / self.temperature)

    def forward(self, hiddens: Sequence[Tensor], positions: Tensor | None) -> Tensor:
        """Climb the ladder; see the equation."""
        first, *outputs, last = hiddens
        mask = None
        if positions is not None:
            document = documents(positions)
            same = document[:, None, :, None] == document[:, None, None, :]
            mask = same.tril()  # [B, 1, T, T]
        z = self.embed(first)
        for g, h, rung, block in zip(self.gates(), outputs, self.rungs, self.blocks, strict=True):
            z = block(g * z + (1 - g) * rung(h), mask)
        change = self.U(self.norm(z))
        return last + change if self.residual else change

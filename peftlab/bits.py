"""Nats become bits per token here, as a sum over a sum, and nowhere else.

    bits per token = Σ nats / (ln 2 · Σ targets)

A target is a position whose label is not IGNORE. Sums of subsets add up exactly; means do not.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlab.products import product

IGNORE = -100
LOGITS_PER_CHUNK = 2**24  # 32 MiB of bf16: the largest piece of the logits that ever exists
IN_CACHE = 2**20  # 4 MiB of float32: of that piece, what is worked on at a time on a CPU


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -ln p(target) in nats (float32 scalar), for logits [..., V] and targets [...].

    The plain form: the reference that `linear_nll` is tested against.
    """
    return F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def slope_(logits: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the sum of nats (float32 scalar), and turn the logits into its gradient, in place.

    logits [n, V], without the bias [V]; targets [n, 1]. All in between is float32, of a few rows
    at a time: what stays in the processor's cache takes half the time, and no memory.
    """
    nats = logits.new_zeros((), dtype=torch.float32)
    for part, target in _few_rows(logits, targets):
        z = part.float() if bias is None else part.float() + bias.float()
        p = z.softmax(-1)
        # -ln p(target), by way of the largest p, which is never too small for a logarithm: the
        # exponentials are computed once, not for log-softmax and again for the gradient
        nats += (z.amax(-1) - z.gather(1, target).squeeze(1) - p.amax(-1).log()).sum()
        minus_one = -torch.ones_like(target, dtype=torch.float32)
        part.copy_(p.scatter_add_(1, target, minus_one))  # softmax - one-hot
    return nats


def _few_rows(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = len(logits) if logits.is_cuda else IN_CACHE // logits.shape[1]
    rows = max(1, rows)
    return zip(logits.split(rows), targets.split(rows), strict=True)


def linear_nll(hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """`nll(hidden @ head.T + bias, targets)` without keeping the logits.

    hidden [..., D], head [V, D], bias [V] or None, targets [...]. Exact, up to rounding: only
    positions with a target are projected, chunk by chunk, and the gradient with respect to
    hidden and head is formed in the same pass.
    """
    scored = targets != IGNORE
    return _LinearNLL.apply(hidden[scored], head, bias, targets[scored])


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, bias, targets):  # [N, D], [V, D], [V] or None, [N]
        needs_hidden, needs_head, needs_bias, _ = ctx.needs_input_grad
        dtype = _matmul_dtype(hidden)
        weight = head.to(dtype)
        nats = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for part in _chunks(len(hidden), max(1, LOGITS_PER_CHUNK // head.shape[0])):
            x = hidden[part].to(dtype)
            logits = product(x, weight.T)
            if any(ctx.needs_input_grad):
                nats += slope_(logits, bias, targets[part, None])
            else:
                for some, target in _few_rows(logits, targets[part]):
                    nats += nll(some if bias is None else some.float() + bias, target)
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=torch.float32)
            if d_hidden is not None:
                d_hidden[part] = product(logits, weight)
            if d_head is not None:
                d_head += product(logits.T, x)
            del logits  # the next ones are written where these were, in the processor's cache
        ctx.gradients = (d_hidden, d_head, d_bias)
        ctx.dtypes = (hidden.dtype, head.dtype, None if bias is None else bias.dtype)
        return nats

    @staticmethod
    def backward(ctx, *upstream):  # one scalar
        (scale,) = upstream
        gradients = [
            None if g is None else (g * scale).to(dtype)
            for g, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        return *gradients, None


def _chunks(n: int, most: int) -> Iterator[slice]:
    """Cut n rows into as few chunks as hold `most` each, equally long but for one row."""
    pieces = math.ceil(n / most)
    return (slice(n * i // pieces, n * (i + 1) // pieces) for i in range(pieces))


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer on x multiplies here: autocast's if on."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


@dataclass
class Tally:
    """Raw sums over a split or a step: nats and targets."""

    nats: float = 0.0
    targets: int = 0

    def add(self, nats: float, targets: int) -> None:
        """Add a batch's sum of nats and its number of targets."""
        self.nats += nats
        self.targets += targets

    @property
    def bits_per_token(self) -> float:
        """Σ nats / (ln 2 · Σ targets)."""
        return self.nats / (math.log(2) * self.targets)

    def bits_per_byte(self, n_bytes: int) -> float | None:
        """Σ nats / (ln 2 · bytes of the scored text): comparable across tokenizers."""
        return self.nats / (math.log(2) * n_bytes) if n_bytes else None


def perplexity(bits_per_token: float) -> float:
    """2^bits, infinite past the largest float."""
    return 2.0**bits_per_token if bits_per_token < 1024 else math.inf

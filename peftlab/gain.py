"""Outputs scaled by a trained gain: a pass over memory each way, not four.

On a CPU, methods with a gain per output (DoRA and its kin, IA3) spend what they need beyond LoRA
in reading and writing the outputs of the layers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gained(y: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return y + gain (y - bias), rounded once: a small gain keeps its digits in bf16.

    y [..., d]; gain [d], float32; bias [d] or None, a constant.
    """
    if torch.compiler.is_compiling():  # which fuses the plain form, and cannot see into the other
        return plain_gained(y, gain, bias)
    return _Gained.apply(y, gain, bias)


def plain_gained(y: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gained` as it is written: the reference."""
    return y + gain.to(y.dtype) * (y if bias is None else y - bias)


class _Gained(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, gain, bias):
        ctx.save_for_backward(y, gain, bias)
        return torch.addcmul(y, y if bias is None else y - bias, gain.to(y.dtype))

    @staticmethod
    def backward(ctx, *upstream):
        (slope,) = upstream
        y, gain, bias = ctx.saved_tensors
        needs_y, needs_gain, _ = ctx.needs_input_grad
        d_y = d_gain = None
        if needs_gain:
            product = slope * (y if bias is None else y - bias)
            d_gain = product.flatten(0, -2).sum(0).to(gain.dtype)
            d_y = product  # memory that was just written is quicker than what is new
        if needs_y:
            d_y = torch.addcmul(slope, slope, gain.to(slope.dtype), out=d_y)
        return d_y if needs_y else None, d_gain, None

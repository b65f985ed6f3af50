"""Outputs scaled by a trained gain: a pass over memory each way, not four.

On a CPU, methods with a gain per output (DoRA and its kin, IA3) spend what they need beyond LoRA
in reading and writing the outputs of the layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

IN_CACHE = 2**17  # 256 KiB of bf16: of the product that is summed, what exists at a time on a CPU


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
        (d_out,) = upstream
        y, gain, bias = ctx.saved_tensors
        needs_y, needs_gain, _ = ctx.needs_input_grad
        d_y = torch.empty_like(d_out, memory_format=torch.contiguous_format)
        d_gain = torch.zeros_like(gain)
        factor = gain.to(d_out.dtype)
        y, slopes, into = y.flatten(0, -2), d_out.flatten(0, -2), d_y.flatten(0, -2)
        rows = len(y) if y.is_cuda else max(1, IN_CACHE // y.shape[1])
        for at in range(0, len(y), rows):  # each slope is read once, for both
            slope = slopes[at : at + rows]
            if needs_y:
                torch.addcmul(slope, slope, factor, out=into[at : at + rows])
            if needs_gain:
                some = y[at : at + rows]
                d_gain += ((some if bias is None else some - bias) * slope).sum(0)
        return d_y if needs_y else None, d_gain if needs_gain else None, None

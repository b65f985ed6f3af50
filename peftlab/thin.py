"""A product of two thin matrices, added to the output of a layer where it stands.

As it is written, the product goes to memory, is read again beside the output, and their sum goes
to memory. On a CPU such passes are much of what LoRA and its kin cost beyond the frozen layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftlab.products import linear, outer, product


def add_thin_(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return y + up (down x), rounded once, in place of y, which nobody else may hold.

    y [..., d_out]; x [..., d_in]; down [r, d_in]; up [d_out, r]. A y that is a view of another
    tensor, as a quantised layer's is, stays as it is, and the sum is a new tensor.
    """
    # the compiler fuses the sum, and cannot see into the other form
    if torch.compiler.is_compiling() or y._base is not None:
        return plain_add_thin(y, x, down, up)
    return _AddThin.apply(y, x, down, up)


def plain_add_thin(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """`add_thin_` as it is written: the reference."""
    return y + linear(linear(x, down), up)


class _AddThin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, down, up):
        ctx.dtypes = x.dtype, down.dtype, up.dtype
        ctx.shape = x.shape
        # as autocast, which does not reach into `out=`; y has its type already
        x, down, up = (t.to(y.dtype) for t in (x.flatten(0, -2), down, up))
        h = product(x, down.T)
        flat = y.view(-1, y.shape[-1])
        torch.addmm(flat, h, up.T, out=flat)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, h, down, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        (d_y,) = upstream
        x, h, down, up = ctx.saved_tensors
        _, needs_x, needs_down, needs_up = ctx.needs_input_grad
        slope = d_y.flatten(0, -2)
        d_h = product(slope, up)
        d_x = product(d_h, down).view(ctx.shape) if needs_x else None
        d_down = outer(d_h, x) if needs_down else None
        d_up = outer(slope, h) if needs_up else None
        gradients = zip((d_x, d_down, d_up), ctx.dtypes, strict=True)
        return d_y, *(None if d is None else d.to(dtype) for d, dtype in gradients)

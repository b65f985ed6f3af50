"""Matrix products in float32, by oneDNN where MKL, which torch takes, leaves AVX-512 unused.

MKL multiplies with AVX-512 on Intel's processors alone. On AMD's Zen 5 oneDNN, which torch has with
it for bf16, takes less than half of the time; both round each product as float32 does.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _is_faster() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpuinfo.exists()
        and "AuthenticAMD" in cpuinfo.read_text()
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


# Whether oneDNN multiplies float32 faster here, by the make of the processor: a choice by time
# could be another one the next time, and the same run have other last bits.
ONEDNN_IS_FASTER = _is_faster()
SMALLEST = 2**22  # multiplications; of fewer, a call of oneDNN from Python costs what it saves


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`: x [..., d_in], weight [d_out, d_in], bias [d_out] or None."""
    return (_linear if _takes(x, weight, x.shape[-1]) else F.linear)(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, for a [m, k] and b [k, n]."""
    return _linear(a, b.T, None) if _takes(a, b, len(b)) else a @ b


def outer(slope: Tensor, x: Tensor) -> Tensor:
    """Gradient of W [d_out, d_in] in y = x Wᵀ, from that of y [..., d_out] and x [..., d_in].

    A W of few columns is made with rows and columns exchanged, up to ten times as fast.
    """
    a, b = slope.flatten(0, -2), x.flatten(0, -2)
    return product(b.T, a).T if 4 * b.shape[1] < a.shape[1] else product(a.T, b)


def use_onednn_(net: nn.Module) -> None:
    """Let each plain linear layer of `net` multiply by `linear`, if that makes a difference here.

    Done in place: who holds a layer still does, and it stays an nn.Linear.
    """
    if ONEDNN_IS_FASTER:
        for module in net.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear


class Linear(nn.Linear):
    """An nn.Linear that multiplies by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map x [..., d_in] to x weightᵀ + b [..., d_out]."""
        return linear(input, self.weight, self.bias)


def _takes(a: Tensor, b: Tensor, inner: int) -> bool:
    return (
        a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and ONEDNN_IS_FASTER
        and not torch.is_autocast_enabled("cpu")
        # a graph is for any number of rows
        and (torch.compiler.is_compiling() or a.numel() * b.numel() >= SMALLEST * inner)
    )


# An operator of its own: the compiler leaves it whole, and the FLOP counter knows it.
@torch.library.custom_op("peftlab::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.flatten(0, -2)
    y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(weight)))  # no view of another tensor


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def _keep(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)


def _backward(ctx, slope: Tensor):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    d_x = _linear(slope, weight.T, None) if needs_x else None
    d_weight = outer(slope, x) if needs_weight else None
    return d_x, d_weight, slope.flatten(0, -2).sum(0) if needs_bias else None


_linear.register_autograd(_backward, setup_context=_keep)

"""Count the floating-point operations of what runs inside a block, by torch's own formulas.

`torch.utils.flop_counter.FlopCounterMode` counts the same, but for torch's attention on the CPU,
for which it has no formula, and it doubles the time of the step that it counts.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import peftlab.products  # noqa: F401  registers the operator


def _attention(query, key, value, *args, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient, query, key, value, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


def _linear(x, weight, bias, *, out_val) -> int:
    return 2 * out_val.numel() * weight.shape[1]


FORMULAS = {
    torch.ops.peftlab.linear: _linear,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **flop_registry,
}


class FlopCounter(TorchDispatchMode):
    """Use as a context manager; `total` is the sum over all operators with a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out

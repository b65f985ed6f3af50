"""Count the floating-point operations of what runs inside a block, by torch's own formulas.

`torch.utils.flop_counter.FlopCounterMode` counts the same, but its module tracker keeps the
activations alive: it doubled the peak memory of the step that it counted.
"""

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCounter(TorchDispatchMode):
    """Use as a context manager; `total` is the sum over all operators with a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out

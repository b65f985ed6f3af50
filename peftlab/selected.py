"""Train some of the backbone's own tensors."""

from __future__ import annotations

from torch import nn

from peftlab.errors import require
from peftlab.method import Method
from peftlab.nf4 import NF4Linear


class SelectMethod(Method):
    """Trains some of the backbone's own tensors in place."""

    mergeable = True  # trained in place: nothing is left to do

    def selects(self, name: str, p: nn.Parameter) -> bool:
        """Whether the backbone's tensor `name` is trained."""
        raise NotImplementedError

    def hook(self, backbone: nn.Module) -> None:
        """Unfreeze the selected tensors, which become float32.

        So do frozen vectors beside them: a LayerNorm takes no gain in bf16 with a float32 shift.
        Raises: InputError if a selected tensor is quantised.
        """
        for name, module in backbone.named_modules():
            if isinstance(module, NF4Linear):
                selected = self.selects(f"{name}.weight", nn.Parameter(module.weight, False))
                why = f"null, because {type(self).__name__} trains {name}.weight itself"
                require(not selected, "model.quantize", "nf4", why)
        for name, p in backbone.named_parameters():
            p.requires_grad_(self.selects(name, p))
        for module in backbone.modules():
            own = list(module.parameters(recurse=False))
            if any(p.requires_grad for p in own):
                for p in own:
                    if p.requires_grad or p.ndim == 1:
                        p.data = p.data.float()

    def merge(self, backbone: nn.Module) -> None:
        """Detach: the weights are the backbone's own."""
        self.detach(backbone)

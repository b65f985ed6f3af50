"""Top-layers fine-tuning."""

from collections.abc import Sequence
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from peftlab.errors import require
from peftlab.method import SelectMethod, check_count
from peftlab.methods.layernorm import norms
from peftlab.sites import Site


class TopLayers(SelectMethod):
    """Top-layers fine-tuning: Houlsby et al. 2019, arXiv:1902.00751, section 3.4.

        W' = W + ΔW          ΔW [d_out, d_in] unrestricted in the last k decoder blocks, else 0

    All of the last k blocks is trained, norms and biases too (n_block numbers each), and the final
    norm (n_final_norm numbers) behind them. Nothing is propagated below the first trained block.

    Init: the backbone's own weights, so W' = W at step 0.
    Trainable:
        per model: k * n_block + n_final_norm
    Differs from the paper: no task head is trained. The output embedding stays frozen, tied or
    not: tied, it is the input embedding of the first block.
    """

    def __init__(self, sites: Sequence[Site], *, k: int) -> None:
        super().__init__(sites)
        check_count(k=k)
        self.k = k

    def attach(self, backbone: nn.Module) -> None:
        """Freeze all but the last k blocks and the final norm.

        Raises: InputError if there are fewer than k blocks, or no list of them is found.
        """
        blocks, count = decoder_blocks(backbone)
        check_count(count, k=self.k)
        parent = blocks.rpartition(".")[0]
        beside = [name for name in norms(backbone) if name.rpartition(".")[0] == parent]
        last = [f"{blocks}.{i}" for i in range(count - self.k, count)]
        self.prefixes = tuple(f"{name}." for name in last + beside[-1:])
        super().attach(backbone)

    def selects(self, name: str, p: nn.Parameter) -> bool:
        """Whether it belongs to one of the last k blocks, or to the final norm."""
        return name.startswith(self.prefixes)


def decoder_blocks(backbone: nn.Module) -> tuple[str, int]:
    """Return name and length of the list of decoder blocks.

    It is the outermost list as long as the model has layers: an inner one may hold experts.
    Raises: InputError if there is none, or more than one.
    """
    count = cast(PreTrainedModel, backbone).config.get_text_config().num_hidden_layers
    lists = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outermost = [a for a in lists if not any(a.startswith(f"{b}.") for b in lists)]
    require(
        len(outermost) == 1,
        "method",
        "top_layers",
        f"needs a model with one list of its {count} decoder blocks, this one has {outermost}",
    )
    return outermost[0], count

"""Top-layers fine-tuning."""

from collections.abc import Sequence

from torch import nn

from peftlab.method import check_count
from peftlab.methods.layernorm import norms
from peftlab.selected import SelectMethod
from peftlab.sites import Site, decoder_blocks


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
    Merge: in place.
    Family: selective.
    """

    def __init__(self, sites: Sequence[Site], *, k: int) -> None:
        super().__init__(sites)
        check_count(k=k)
        self.k = k

    def hook(self, backbone: nn.Module) -> None:
        """Unfreeze the last k blocks and the final norm.

        Raises: InputError if there are fewer than k blocks, or no list of them is found.
        """
        blocks, count = decoder_blocks(backbone)
        check_count(count, k=self.k)
        parent = blocks.rpartition(".")[0]
        beside = [name for name in norms(backbone) if name.rpartition(".")[0] == parent]
        last = [f"{blocks}.{i}" for i in range(count - self.k, count)]
        self.prefixes = tuple(f"{name}." for name in last + beside[-1:])
        super().hook(backbone)

    def selects(self, name: str, p: nn.Parameter) -> bool:
        """Whether it belongs to one of the last k blocks, or to the final norm."""
        return name.startswith(self.prefixes)

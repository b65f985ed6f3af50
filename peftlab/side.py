"""Methods beside the backbone: they read its hidden states, and their output takes its place."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftlab.errors import require
from peftlab.method import Method
from peftlab.sites import Site, decoder_blocks


class SideMethod(Method):
    """Replaces the last hidden state by a function of all hidden states of the frozen backbone.

    Nothing of the backbone is kept for backward: it runs without a graph. The sites are one layer
    of kind o per decoder block, whose d_out is the hidden width.
    """

    cached = False

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites)
        for site in sites:
            allowed = "o, one layer per decoder block, as this method stands beside whole blocks"
            require(site.kind == "o", "method.sites", site.kind, allowed)
        self.width = sites[0].d_out  # d
        self.hiddens: list[Tensor] = []

    def forward(self, hiddens: Sequence[Tensor], positions: Tensor | None) -> Tensor:
        """Map hiddens h_0 ... h_L [B, T, d] and the backbone's last one to the new last one.

        hiddens: the embeddings, then each decoder block's output, L + 1 in all; the last hidden
        state, normalised, behind them. positions: [B, T] in packed rows, where each document
        starts at 0 and must not see the one before it; otherwise None.
        """
        raise NotImplementedError

    def hook(self, backbone: nn.Module) -> None:
        """Register hooks: of the decoder blocks, to read, of the decoder, to replace.

        Raises: InputError if the blocks are not one per site.
        """
        name, count = decoder_blocks(backbone)
        allowed = f"one layer of kind o for each of the {count} decoder blocks"
        require(len(self.sites) == count, "method.sites", f"{len(self.sites)} layers", allowed)
        blocks = [backbone.get_submodule(f"{name}.{i}") for i in range(count)]
        decoder = backbone.get_submodule(name.rpartition(".")[0])  # OPT's base model is around it
        self.handles += [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            blocks[0].register_forward_pre_hook(self._embeddings, with_kwargs=True),
            *(block.register_forward_hook(self._block) for block in blocks),
            decoder.register_forward_hook(self._replace, with_kwargs=True),
        ]

    def _begin(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get("attention_mask")
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise TypeError("a side network has no key-value cache: give use_cache=False")
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise TypeError("a side network masks the future only: pad on the right, give no mask")
        self.hiddens = []

    def _embeddings(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        self.hiddens.append(args[0] if args else kwargs["hidden_states"])

    def _block(self, block: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        self.hiddens.append(output[0] if isinstance(output, tuple) else output)

    def _replace(self, decoder: nn.Module, args: tuple, kwargs: dict, output):
        hiddens, self.hiddens = [*self.hiddens, output.last_hidden_state], []
        output.last_hidden_state = self(
            [hidden.detach() for hidden in hiddens], kwargs.get("position_ids")
        )
        return output


def documents(positions: Tensor) -> Tensor:
    """Return each token's document in packed rows, counted from 0 per row: [B, T] to [B, T].

    A new one begins where a position does not follow the one before it.
    """
    jumps = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
    return jumps.cumsum(dim=1)

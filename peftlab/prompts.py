"""Methods that add positions: trained embeddings before the first token, or keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from peftlab.errors import InputError, require
from peftlab.method import Method, SiteMethod, full_precision
from peftlab.sites import Site, decoder_blocks, most_positions

if TYPE_CHECKING:
    from peftlab.data import Batch


class Prefix(NamedTuple):
    """What an attention is given beside its tokens."""

    K: Tensor  # [P, d_kv]
    V: Tensor
    gate: Tensor | None  # [B, T]


class PromptMethod(Method):
    """Puts P trained embeddings before those of the tokens; the backbone's output drops them.

    A subclass has `length`, P, and states `extend`. Losses and logits are those of the tokens. A
    row padded on the left has the padding between prompt and tokens: never seen, but in a model
    with a window it counts as distance.
    """

    identity = False

    def __init__(self, sites: Sequence[Site], *, length: int) -> None:
        super().__init__(sites)
        self.length = self.n_positions = length

    def extend(self, e: Tensor) -> Tensor:
        """Map embeddings e [B, T, d] of the tokens to [B, P + T, d]."""
        raise NotImplementedError

    def hook(self, backbone: nn.Module) -> None:
        """Register hooks of the decoder: before its embeddings, after its last layer.

        Raises: InputError if the decoder cannot be told.
        """
        model = cast(PreTrainedModel, backbone)
        self.embed = partial(_call, model.get_input_embeddings())  # no submodule: not its owner
        self.check_room = partial(check_room, model)
        blocks, _ = decoder_blocks(backbone)
        decoder = backbone.get_submodule(blocks.rpartition(".")[0])  # OPT's base model is around it
        self.names = tuple(inspect.signature(decoder.forward).parameters)
        self.handles += [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after),
        ]

    def prepare(self, nats: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> None:
        """Refuse packed rows, and rows that leave the prompt no room.

        Raises: InputError.
        """
        if any(batch.positions is not None for batch in batches):
            raise InputError(
                "dataset.packing=true: false for a method that puts a prompt before each row"
            )
        self.check_room(max(batch.ids.shape[1] for batch in batches), self.length)

    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Replace ids by extended embeddings, unless a cache already holds the prompt."""
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        positions = kwargs.get("position_ids")
        begun = cache is not None and cache.get_seq_length() > 0
        self.given = 0 if begun else self.length
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.length), mask], 1)
        if positions is not None:
            kwargs["position_ids"] = positions + self.length
        if not begun:
            e = kwargs.get("inputs_embeds")
            e = self.embed(kwargs["input_ids"]) if e is None else e
            self.check_room(e.shape[1], self.length)
            kwargs |= {"input_ids": None, "inputs_embeds": self.extend(e).to(e.dtype)}
            if positions is not None:
                first = torch.arange(self.length, device=e.device).expand(len(positions), -1)
                kwargs["position_ids"] = torch.cat([first, kwargs["position_ids"]], 1)
        return (), kwargs

    def _after(self, decoder: nn.Module, args: tuple, output):
        output.last_hidden_state = output.last_hidden_state[:, self.given :]
        return output


class PrefixMethod(SiteMethod):
    """Puts P trained keys and values before those of the tokens, in the attention of each site.

    A site, of kind o, stands for the attention that it belongs to. The slots have no position: they
    are not rotated, the tokens keep their positions, and every token sees every slot, whatever the
    window. A subclass states `kv`, and `gate` if it has one.
    """

    identity = False

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites)
        for site in sites:
            require(site.kind == "o", "method.sites", site.kind, "a prefix belongs to the kind o")

    def kv(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Return K and V [P, d_kv], the key heads one after another, as in the site's layer."""
        raise NotImplementedError

    def gate(self, t: SimpleNamespace, x: Tensor) -> Tensor | None:
        """Return [B, T], by which the token's own view of K and V is multiplied; None is 1.

        x [B, T, d]: what enters the attention.
        """
        return None

    @torch.no_grad()
    def states(self, backbone: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return K and V [P, d_kv] of tokens ids [P] in each site's layer: a start for the slots.

        They are those that a cache holds: keys rotated as at the positions 0 ... P - 1. Before
        the method is hooked these are the backbone's own.
        Raises: InputError if the model has fewer positions.
        """
        check_room(cast(PreTrainedModel, backbone), 0, len(ids))
        cache = DynamicCache()
        cast(nn.Module, backbone.base_model)(ids[None], past_key_values=cache, use_cache=True)
        layers = cast(list[DynamicLayer], cache.layers)  # keys and values [1, H_kv, P, h]
        return [(_joined(layer.keys), _joined(layer.values)) for layer in layers]

    def place(self, backbone: nn.Module, site: Site) -> nn.Module:
        """Return the attention that holds the site."""
        return backbone.get_submodule(site.name.rpartition(".")[0])

    def hook(self, backbone: nn.Module) -> None:
        """Give each attention its prefix, and all of them an implementation that looks at it.

        Raises: InputError if the model's attention cannot be exchanged.
        """
        places = self.acting(backbone)
        model = cast(PreTrainedModel, backbone)
        # a sink is one more score, which is not ours to know
        sinks = any(hasattr(place, "sinks") for place, _ in places)
        fitting = "for a prefix one whose attention can be exchanged"
        require(not sinks, "model", type(model).__name__, fitting)
        self.replaced = cast(str, model.config._attn_implementation)
        function = attend if self.replaced == "eager" else attend_fused
        name = f"peftlab_{function.__name__}"
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, eager_mask)
        model.set_attn_implementation(name)
        taken = model.config._attn_implementation == name
        require(taken, "model", type(model).__name__, fitting)
        for place, t in places:
            give = partial(_give, self, t)
            self.handles.append(place.register_forward_pre_hook(give, with_kwargs=True))

    def unhook(self, backbone: nn.Module) -> None:
        """Give the backbone its own attention back."""
        super().unhook(backbone)
        cast(PreTrainedModel, backbone).set_attn_implementation(self.replaced)


def check_room(model: PreTrainedModel, longest: int, length: int) -> None:
    """Require that `length` more positions fit into the model beside a row of `longest` tokens."""
    most = most_positions(model)
    rows = f", the longest row takes {longest}" if longest else ""
    room = f"at most {max(most - longest, 0)} (the model has {most} positions{rows})"
    require(longest + length <= most, "method.length", length, room)


def drawn_tokens(backbone: nn.Module, count: int, common: int, seed: int) -> Tensor:
    """Draw `count` ids from the `common` first of the vocabulary, each again only after all."""
    table = cast(nn.Embedding, cast(PreTrainedModel, backbone).get_input_embeddings())
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(min(common, table.num_embeddings), generator=generator)
    return repeated(order, count).to(table.weight.device)


def repeated(ids: Tensor, count: int) -> Tensor:
    """Repeat or cut ids to [count]."""
    return ids[torch.arange(count) % len(ids)]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    prefix: Prefix | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the prefix, if there is one, and the tokens.

    query [B, H, T, h], key and value [B, H_kv, S, h], attention_mask [., 1, T, S] additive.
    Returns the output [B, T, H, h] and the weights [B, H, T, P + S].
    """
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    K, V, g = _for_heads(prefix, query, groups)
    P = K.shape[1]
    scores = torch.cat([g * (query @ K.mT), query @ key.mT], dim=-1) * scale  # [B, H, T, P + S]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + F.pad(attention_mask, (P, 0))
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    output = g * (weights[..., :P] @ V) + weights[..., P:] @ value
    return output.transpose(1, 2).contiguous(), weights


def attend_fused(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    prefix: Prefix | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """`attend` by torch's own kernel, which keeps no weights for backward, and returns none."""
    if softcap is not None:
        return attend(module, query, key, value, attention_mask, scaling, dropout, softcap, prefix)
    B, H, T, h = query.shape
    groups = H // key.shape[1]
    scale = h**-0.5 if scaling is None else scaling
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    K, V, g = (x.expand(B, *x.shape[-3:]) for x in _for_heads(prefix, query, groups))
    mask = attention_mask
    if mask is not None:
        mask = F.pad(mask, (K.shape[2], 0)).to(query.dtype)
    if prefix is None or prefix.gate is None:
        keys, values = torch.cat([K, key], dim=2), torch.cat([V, value], dim=2)
    else:  # twice as wide: the left half is for the tokens, the right one for the prefix
        query = torch.cat([query, g * query], dim=-1)
        keys, values = (
            torch.cat([F.pad(slots, (h, 0)), F.pad(tokens, (0, h))], dim=2)
            for slots, tokens in ((K, key), (V, value))
        )
    drop = dropout if module.training else 0.0
    output = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, dropout_p=drop, scale=scale
    )
    if output.shape[-1] > h:
        output = output[..., :h] + g * output[..., h:]
    return output.transpose(1, 2).contiguous(), None


def _for_heads(prefix: Prefix | None, query: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return K and V [H, P, h], each head for its group of queries, and the gate [., 1, ., 1]."""
    H, h = query.shape[1], query.shape[-1]
    if prefix is None:
        return query.new_zeros(H, 0, h), query.new_zeros(H, 0, h), query.new_ones(1, 1, 1, 1)
    K, V = (
        x.unflatten(-1, (-1, h)).transpose(0, 1).repeat_interleave(groups, dim=0).to(query.dtype)
        for x in (prefix.K, prefix.V)
    )
    gate = prefix.gate
    g = query.new_ones(1, 1, 1, 1) if gate is None else gate.to(query.dtype)[:, None, :, None]
    return K, V, g


def _joined(heads: Tensor | None) -> Tensor:
    """Lay heads [1, H_kv, P, h] one after another: [P, H_kv * h]."""
    return cast(Tensor, heads)[0].transpose(0, 1).flatten(1)


def _give(method: PrefixMethod, t: SimpleNamespace, module: nn.Module, args: tuple, kwargs: dict):
    """Add the prefix to what the attention hands on to `attend`."""
    x = args[0] if args else kwargs["hidden_states"]
    with full_precision(x):
        K, V = method.kv(t)
    return args, {**kwargs, "prefix": Prefix(K, V, method.gate(t, x))}


def _call(module: nn.Module, *args: Tensor) -> Tensor:
    return module(*args)

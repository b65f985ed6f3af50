"""A prefix in the form that peft knows: a cache filled before the first token.

Ours has no position, and the tokens keep theirs. Beside a cache of P slots a model counts its
tokens from P. Where positions are rotations this is the same function, once the keys are rotated
by P too: only differences of positions count. Elsewhere it is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from peftlab.peft_form import NoPeftForm, PeftForm, cache_form
from peftlab.prompts import PrefixMethod

PROBE = 8  # tokens, on which cache and prefix are compared
RELATIVE = 1e-4  # of the largest logit


def cached(method: PrefixMethod, net: PreTrainedModel) -> PeftForm:
    """Return the attached method's keys and values as a cache, of equal logits on a probe.

    Raises: NoPeftForm if no such cache exists.
    """
    config = net.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if any("sliding" in kind for kind in kinds) or getattr(config, "sliding_window", None):
        raise NoPeftForm("to peft a prefix is part of the window, which the tokens leave behind")
    if len(method.sites) != config.num_hidden_layers:
        raise NoPeftForm("peft puts a prefix before every layer, and here only some have one")
    slots = [method.kv(t) for t in method.tensors]
    ids = (torch.arange(PROBE, device=slots[0][0].device) % config.vocab_size)[None]
    wanted = net(input_ids=ids, use_cache=False).logits
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    places = [method.place(net, site) for site in method.sites]
    method.unhook(net)
    try:
        turned = _rotated(net, places, slots, heads)
        cache = DynamicCache()
        for layer, pair in enumerate(turned):
            K, V = (_by_head(x, heads)[None] for x in pair)
            cache.update(K, V, layer)
        found = net(input_ids=ids, past_key_values=cache, use_cache=True).logits
    finally:
        method.hook(net)
    if (found - wanted).abs().max() > RELATIVE * wanted.abs().max().clamp(min=1):
        raise NoPeftForm("to peft a prefix takes positions, which this model adds to its tokens")
    return cache_form(turned, heads, config)


def _rotated(
    net: PreTrainedModel,
    places: Sequence[nn.Module],
    slots: Sequence[tuple[Tensor, Tensor]],
    heads: int,
) -> list[tuple[Tensor, Tensor]]:
    """Rotate the keys as the attentions of `net` rotate those of a token at position P."""
    P = len(slots[0][0])
    angles: dict[nn.Module, tuple[Tensor, Tensor] | None] = {}

    def look(place: nn.Module, args: tuple, kwargs: dict) -> None:
        angles[place] = kwargs.get("position_embeddings")

    handles = [place.register_forward_pre_hook(look, with_kwargs=True) for place in places]
    try:
        cast(nn.Module, net.base_model)(
            input_ids=torch.zeros(1, P + 1, dtype=torch.int64, device=slots[0][0].device),
            use_cache=False,
        )
    finally:
        for handle in handles:
            handle.remove()
    turned = []
    for place, (K, V) in zip(places, slots, strict=True):
        found = angles[place]
        if found is not None:
            cos, sin = (x[0, P] for x in found)  # [h], or less: the rest of a head is not rotated
            keys = _by_head(K, heads)  # [H_kv, P, h]
            part, rest = keys.split([len(cos), keys.shape[-1] - len(cos)], dim=-1)
            left, right = part.chunk(2, dim=-1)
            part = part * cos + torch.cat([-right, left], dim=-1) * sin
            K = torch.cat([part, rest], dim=-1).transpose(0, 1).flatten(1)
        turned.append((K, V))
    return turned


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[P, H_kv h] to [H_kv, P, h]."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)

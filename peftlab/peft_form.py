"""What a method is in the words of Hugging Face's peft: a configuration, and tensors by its names.

Written without peft. A `PeftForm` computes what the method computes; scales and ties are gone, for
peft knows others: each site's factors are written out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from peftlab.sizes import kron_sizes

if TYPE_CHECKING:
    from peftlab.sites import Site


class NoPeftForm(TypeError):
    """No type of peft computes what the method computes; the text says why."""


class PeftForm(NamedTuple):
    """An adapter of peft, but for what it says about the base model."""

    config: dict[str, Any]  # of adapter_config.json; fan_in_fan_out, if the type knows Conv1D
    tensors: dict[str, Tensor]  # of adapter_model.safetensors


def at(site: str, part: str) -> str:
    """Return peft's name of a part of the adapter of one module."""
    return f"base_model.model.{site}.{part}"


def lora_form(
    sites: Sequence[Site],
    factors: Sequence[tuple[Tensor, Tensor]],
    magnitudes: Sequence[Tensor] | None = None,
) -> PeftForm:
    """Return LORA with W' = W + up down; down [r, d_in], up [d_out, r], with every scale inside.

    Components that are zero, and so add nothing, are left out. magnitudes [d_out] of each site,
    if any: DoRA, where the rows of W + up down are then given these norms.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for site, (down, up) in zip(sites, factors, strict=True):
        kept = down.ne(0).any(1) & up.ne(0).any(0)
        kept[0] |= ~kept.any()  # peft has no rank 0
        ranks[site.name] = int(kept.sum())
        tensors[at(site.name, "lora_A.weight")] = down[kept]
        tensors[at(site.name, "lora_B.weight")] = up[:, kept]
    if magnitudes is not None:
        for site, m in zip(sites, magnitudes, strict=True):
            tensors[at(site.name, "lora_magnitude_vector")] = m
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}
    config = {
        "peft_type": "LORA",
        "target_modules": list(ranks),
        "r": common,
        "lora_alpha": common,  # the scale is alpha / r
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": magnitudes is not None,
        "fan_in_fan_out": False,
    }
    return PeftForm(config, tensors)


def kronecker_form(
    sites: Sequence[Site],
    pairs: Sequence[tuple[Tensor, Tensor | tuple[Tensor, Tensor]]],
    rank: int | None = None,
) -> PeftForm:
    """Return LOKR with W' = W + A ⊗ B for the pair A, B of each site.

    B may be two factors of rank `rank`, whose product it is; null: it never is.
    Raises: NoPeftForm if no `decompose_factor` gives all matrices their sizes.
    """
    tensors: dict[str, Tensor] = {}
    sizes = []
    for site, (A, B) in zip(sites, pairs, strict=True):
        tensors[at(site.name, "lokr_w1")] = A
        if isinstance(B, Tensor):
            tensors[at(site.name, "lokr_w2")] = B
            sizes.append((*A.shape, *B.shape))
        else:
            tensors[at(site.name, "lokr_w2_a")], tensors[at(site.name, "lokr_w2_b")] = B
            sizes.append((*A.shape, len(B[0]), B[1].shape[1]))
    shapes = [(site.d_out, site.d_in) for site in sites]
    candidates = (-1, *sorted({n for size in sizes for n in size[:2]}))
    fitting = [f for f in candidates if [kron_sizes(*shape, f, f) for shape in shapes] == sizes]
    if not fitting:
        raise NoPeftForm("peft's LOKR splits d_out and d_in by one factor, and here are two")
    r = rank or max(max(size[2:]) for size in sizes)
    config = {
        "peft_type": "LOKR",
        "target_modules": [site.name for site in sites],
        "r": r,
        "alpha": r,  # the scale is alpha / r
        "decompose_both": False,
        "decompose_factor": fitting[0],
    }
    return PeftForm(config, tensors)


def prompt_form(prompt: Tensor, config: Any) -> PeftForm:
    """Return PROMPT_TUNING with the embeddings `prompt` [P, d]; config: the model's."""
    return _virtual_tokens("PROMPT_TUNING", prompt, prompt.shape[1], config, {})


def cache_form(slots: Sequence[tuple[Tensor, Tensor]], heads: int, config: Any) -> PeftForm:
    """Return PREFIX_TUNING with keys and values [P, d_kv] of every layer, of so many heads.

    To peft they are a filled cache: the tokens' positions begin at P. config: the model's.
    """
    both = torch.cat([torch.cat(pair, dim=1) for pair in slots], dim=1)  # [P, layers 2 d_kv]
    width = slots[0][0].shape[1]
    more = {"prefix_projection": False, "num_attention_heads": heads}
    return _virtual_tokens("PREFIX_TUNING", both, width, config, more)


def _virtual_tokens(
    peft_type: str, embeddings: Tensor, width: int, config: Any, more: Mapping[str, Any]
) -> PeftForm:
    settings = {
        "peft_type": peft_type,
        "num_virtual_tokens": len(embeddings),
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        **more,
    }
    return PeftForm(settings, {"prompt_embeddings": embeddings})

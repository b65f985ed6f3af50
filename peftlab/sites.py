"""The linear layers of a backbone that a method may change, and what each is called."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from torch import nn
from transformers import PreTrainedModel

from peftlab.errors import InputError, require

_LLAMA = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# model_type of the Hugging Face config -> kind -> end of the module's name
FAMILIES: dict[str, dict[str, str]] = {
    **dict.fromkeys(
        ("llama", "mistral", "gemma", "gemma2", "gemma3", "gemma3_text", "qwen2", "qwen3"), _LLAMA
    ),
    "gpt2": {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    "gpt_neox": {
        "qkv": "attention.query_key_value",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    "opt": {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
    },
}
FUSED = "qkv"  # the kind of a layer whose rows are those of q, k and v
MLP = ("gate", "up", "down")  # kinds of its layers, those that a model has
HEADS_APART = {"gpt2": False, "gpt_neox": True}  # rows: [q | k | v], or so within each head


class Site(NamedTuple):
    """One linear layer of the frozen backbone, or some of its rows, that a method may change."""

    name: str  # "model.layers.3.self_attn.q_proj"
    kind: str  # its role, the same word in every layer: "q"; "k+v" of rows of a fused layer
    module: nn.Linear  # W [d_out, d_in], b [d_out] or None; never trained
    rows: tuple[int, ...] | None = None  # of W, ascending, that are the site; None = all
    d_kv: int = 0  # width of all keys of a token in this backbone: key heads x head width

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.module.in_features

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.module.out_features

    @property
    def n_rows(self) -> int:
        """How many of the d_out rows the site has."""
        return self.d_out if self.rows is None else len(self.rows)

    @property
    def group(self) -> str:
        """The tie group: sites of one kind and shape share `tied` tensors; others never do."""
        return f"{self.kind}.{self.d_in}x{self.d_out}"


def kinds_of(model_type: str, given: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return kind -> end of module name: `given` (model.kinds) if set, else the family's.

    Raises: InputError for an architecture without an entry, saying how to give `model.kinds`.
    """
    if given:
        return given
    if model_type not in FAMILIES:
        raise InputError(
            f"model.kinds=null: architecture {model_type!r} is unknown (known: "
            f"{', '.join(FAMILIES)}); name its linear layers, e.g. "
            "'model.kinds={q: self_attn.q_proj, v: self_attn.v_proj}'"
        )
    return FAMILIES[model_type]


def find_sites(
    net: PreTrainedModel, kinds: Mapping[str, str], wanted: str | Sequence[str]
) -> tuple[Site, ...]:
    """Return the sites of the wanted kinds in layer order; `wanted`: all, mlp, or a list of kinds.

    Where q, k and v are one layer, of kind qkv, wanting some of them gives sites with `rows`.
    Raises: InputError if a kind is not mapped, or names no linear layer of this model.
    """
    words = {"all": list(kinds), "mlp": [kind for kind in kinds if kind in MLP]}
    chosen = words.get(wanted, [wanted]) if isinstance(wanted, str) else wanted
    known = f"all, mlp, or a list out of {', '.join(kinds)}"
    texts = isinstance(chosen, Sequence) and all(isinstance(kind, str) for kind in chosen)
    require(texts and len(chosen) > 0, "method.sites", wanted, known)
    parts = _parts(net, kinds, chosen)
    chosen = [kind for kind in chosen if kind not in parts] + [FUSED] * bool(parts)
    for kind in chosen:
        require(
            kind in kinds,
            "method.sites",
            kind,
            f"this model has the kinds {', '.join(kinds)} (or all, or mlp)",
        )
    ends = {"." + kinds[kind]: kind for kind in chosen}
    d_kv = _d_kv(net)
    sites = [
        Site(name, kind, module, d_kv=d_kv)
        for name, module in net.named_modules()
        for end, kind in ends.items()
        if name.endswith(end) and isinstance(module, nn.Linear)
    ]
    missing = set(chosen) - {site.kind for site in sites}
    for kind in sorted(missing):
        raise InputError(
            f"model.kinds.{kind}={kinds[kind]}: no linear layer of the model has a name that "
            "ends so"
        )
    if 0 < len(parts) < len(FUSED):
        sites = [_rows_of(site, parts, net) if site.kind == FUSED else site for site in sites]
    return tuple(sites)


def _d_kv(net: PreTrainedModel) -> int:
    config = net.config.get_text_config()
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return (getattr(config, "num_key_value_heads", None) or heads) * head_width


def _parts(net: PreTrainedModel, kinds: Mapping[str, str], chosen: Sequence[str]) -> list[str]:
    """Return the chosen kinds out of q, k and v that are no layers here, but rows of a known one.

    Beside a chosen qkv there are none: a layer is one site.
    """
    if FUSED not in kinds or FUSED in chosen or net.config.model_type not in HEADS_APART:
        return []
    return [kind for kind in FUSED if kind in chosen and kind not in kinds]


def _rows_of(site: Site, parts: Sequence[str], net: PreTrainedModel) -> Site:
    """Reduce a fused site to the rows of `parts`."""
    heads = net.config.num_attention_heads if HEADS_APART[net.config.model_type] else 1
    width = site.d_out // (heads * len(FUSED))
    rows = (row for row in range(site.d_out) if FUSED[row // width % len(FUSED)] in parts)
    return site._replace(kind="+".join(parts), rows=tuple(rows))


def decoder_blocks(backbone: nn.Module) -> tuple[str, int]:
    """Return name and length of the list of decoder blocks.

    It is the outermost list as long as the model has layers: an inner one may hold experts.
    Raises: InputError if there is none, or more than one.
    """
    count = cast(PreTrainedModel, backbone).config.get_text_config().num_hidden_layers
    lists = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and not name.startswith("peft.")  # an attached method's own
    ]
    outermost = [a for a in lists if not any(a.startswith(f"{b}.") for b in lists)]
    require(
        len(outermost) == 1,
        "model",
        type(backbone).__name__,
        f"for this method one with one list of its {count} decoder blocks; it has {outermost}",
    )
    return outermost[0], count


def blocks_of(net: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder blocks, lowest first; raises as `decoder_blocks`."""
    name, _ = decoder_blocks(net)
    return list(net.get_submodule(name).children())


def touched(module: nn.Module) -> bool:
    """Whether somebody acts on a module's input or output."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def most_positions(net: PreTrainedModel) -> float:
    """Return how many positions the model has; infinity if its config names no limit."""
    return getattr(net.config.get_text_config(), "max_position_embeddings", None) or math.inf

"""The sizes that the original experiment logged, for gemma-2b and Llama-3.1-8B.

Everything stands on the meta device: shapes without memory.
"""

from collections.abc import Callable

import pytest
import torch
from conftest import defaults, make
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from peftlab.cards import card
from peftlab.method import trainable
from peftlab.parts import NOT_ARGUMENTS
from peftlab.sites import FAMILIES, find_sites


def gemma_2b() -> nn.Module:
    config = GemmaConfig(
        vocab_size=256_000,
        hidden_size=2048,
        intermediate_size=16_384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return GemmaForCausalLM(config)


def llama_8b() -> nn.Module:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"gemma": gemma_2b, "llama": llama_8b}
N_PARAMS = {"gemma": 2_506_172_416, "llama": 8_030_261_248}
SHAPES = {  # kind: (d_in, d_out)
    "gemma": {
        "q": (2048, 2048),
        "k": (2048, 256),
        "v": (2048, 256),
        "o": (2048, 2048),
        "gate": (2048, 16_384),
        "up": (2048, 16_384),
        "down": (16_384, 2048),
    },
    "llama": {
        "q": (4096, 4096),
        "k": (4096, 1024),
        "v": (4096, 1024),
        "o": (4096, 4096),
        "gate": (4096, 14_336),
        "up": (4096, 14_336),
        "down": (14_336, 4096),
    },
}

R8 = {"rank": 8}
BARE = {"pre": False, "post": False}
PRE_POST = {"pre": True, "post": True}
POST = {"pre": False, "post": True}
LOGGED = [  # method, settings, gemma-2b, Llama-3.1-8B (None: not logged)
    ("lora", R8, 9_805_824, 20_971_520),
    ("normed_lora", R8, 9_805_824, 20_971_520),
    ("strong_gamma_lora", R8, 9_805_824, 20_971_520),
    ("dora", R8, 10_515_456, 22_347_776),
    ("simple_dora", R8, 10_515_456, 22_347_776),
    ("tied_lora", {"rank": 8, "u": True, "v": True}, 1_255_408, 2_033_408),
    ("tied_lora", {"rank": 128, "u": True, "v": True}, 9_442_048, 11_890_688),
    ("tied_lora_extra", {"r_1": 8, "r_2": 8, **BARE}, 552_832, 669_696),
    ("tied_lora_extra", {"r_1": 8, "r_2": 8, **PRE_POST}, 1_778_560, None),
    ("tied_lora_extra", {"r_1": 128, "r_2": 128, **POST}, 11_490_304, 15_532_032),
    ("tensor_embedding", {"r_1": 8, "r_2": 8, "l_1": 4, **BARE}, 547_064, 658_048),
    ("tensor_embedding", {"r_1": 32, "r_2": 32, "l_1": 8, **POST}, 2_947_056, 4_056_832),
    (
        "partially_tied_lora",
        {"rank": 8, "l_a": 2, "l_b": 2, "mid": False, **BARE},
        1_090_040,
        1_311_616,
    ),
    (
        "partially_tied_lora",
        {"rank": 8, "l_a": 4, "l_b": 4, "mid": True, **POST},
        2_890_720,
        4_001_280,
    ),
    (
        "partially_tied_lora",
        {"rank": 32, "l_a": 4, "l_b": 4, "mid": False, **BARE},
        8_717_296,
        10_487_552,
    ),
]
# Not logged; by the cards' formulas. VeRA: 18 * (7 * 256 + 39424), 32 * (7 * 256 + 43008), the
# last being the sum of d_out. SVDoRA: 18 * 727552 and 32 * 1038336, kind by kind.
BY_HAND = [
    ("rslora", R8, 9_805_824, 20_971_520),
    ("gamma_lora", R8, 9_805_824, 20_971_520),
    ("pissa", R8, 9_805_824, 20_971_520),
    ("vera", {"rank": 256}, 741_888, 1_433_600),
    ("svdora", {"r_u": 8, "r_v": 8}, 13_095_936, 33_226_752),
    ("full", {}, N_PARAMS["gemma"], N_PARAMS["llama"]),
]
CASES = [
    (model, name, settings, count)
    for name, settings, *counts in LOGGED + BY_HAND
    for model, count in zip(MODELS, counts, strict=True)
    if count is not None
]


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    return {name: build() for name, build in MODELS.items()}


@pytest.mark.parametrize("model", MODELS)
def test_the_models_are_those_of_the_experiment(model, nets):
    net = nets[model]
    assert sum(p.numel() for p in net.parameters()) == N_PARAMS[model]
    found: dict[str, set[tuple[int, int]]] = {}
    sites = find_sites(net, FAMILIES[net.config.model_type], "all")
    for site in sites:
        found.setdefault(site.kind, set()).add((site.d_in, site.d_out))
    assert found == {kind: {shape} for kind, shape in SHAPES[model].items()}
    assert len(sites) == 7 * {"gemma": 18, "llama": 32}[model]


@pytest.mark.parametrize(("model", "name", "settings", "count"), CASES)
def test_trained_parameters_are_those_logged(model, name, settings, count, nets):
    net = nets[model]
    with torch.device("meta"):
        method = make(name, net, **settings)
    method.attach(net)
    assert sum(p.numel() for _, p in trainable(net)) == count
    method.detach(net)
    arguments = {k: v for k, v in defaults(name).items() if k not in NOT_ARGUMENTS} | settings
    assert card(name).count(method.sites, N_PARAMS[model], arguments) == count

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, tiny_gpt2, tiny_llama
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from peftlab.errors import InputError
from peftlab.method import trainable
from peftlab.methods.top_layers import TopLayers

LAYERS = 3
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h"}
EMBEDDINGS = ("model.embed_tokens.", "transformer.wte.", "transformer.wpe.")


def loss_of(net, tokens):
    logits = net(tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def trained(net, k):
    method = TopLayers([], k=k)
    method.attach(net)
    names = {name for name, _ in trainable(net)}
    method.detach(net)
    return names


def test_all_layers_are_full_minus_embeddings(net, tokens, expect_close):
    full = deepcopy(net)
    make("full", full).attach(full)
    make("top_layers", net, k=LAYERS).attach(net)
    names = {name for name, _ in trainable(net)}
    assert names == {n for n, _ in trainable(full) if not n.startswith(EMBEDDINGS)}
    optimizers = [torch.optim.SGD([m.get_parameter(n) for n in names], 0.1) for m in (net, full)]
    for model, optimizer in zip((net, full), optimizers, strict=True):
        for _ in range(3):
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    expect_close(net(tokens).logits, full(tokens).logits)


@pytest.mark.parametrize("k", [1, 2])
def test_nothing_below_is_touched_or_differentiated(k, net, tokens):
    make("top_layers", net, k=k).attach(net)
    before = deepcopy(net.state_dict())
    blocks = net.get_submodule(BLOCKS[net.config.model_type])
    entering = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: entering.append(args[0].requires_grad))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    loss_of(net, tokens).backward()
    optimizer.step()
    first = LAYERS - k  # what enters the first trained block needs no gradient
    assert entering == [False] * (first + 1) + [True] * (k - 1)
    for i, block in enumerate(blocks):
        for p in block.parameters():
            assert (p.grad is not None) == (i >= first)
    changed = {n for n, t in net.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {name for name, _ in trainable(net)}
    assert len(changed) == k * len(list(blocks[0].parameters())) + (2 if "ln_f" in str(net) else 1)


@torch.no_grad()
def test_counts_by_hand():
    with torch.device("meta"):
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128_256,
                hidden_size=4096,
                intermediate_size=14_336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
            )
        )
        gemma = GemmaForCausalLM(GemmaConfig(num_key_value_heads=1, num_attention_heads=8))
    for net, k, expected in (
        (llama, 2, 2 * 218_112_000 + 4096),
        (llama, 32, 8_030_261_248 - 2 * 128_256 * 4096),
    ):
        assert sum(net.get_parameter(name).numel() for name in trained(net, k)) == expected
    embedding = gemma.get_input_embeddings().weight
    rest = sum(p.numel() for p in gemma.parameters() if p is not embedding)
    names = trained(gemma, gemma.config.num_hidden_layers)
    assert sum(gemma.get_parameter(name).numel() for name in names) == rest


SMALL: dict[str, Any] = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": LAYERS}
SMALL |= {"num_attention_heads": 4}
OTHERS = {
    "opt": (
        lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16)),
        "model.decoder.layers.2.",
        "model.decoder.final_layer_norm.",
    ),
    "gpt_neox": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=24)),
        "gpt_neox.layers.2.",
        "gpt_neox.final_layer_norm.",
    ),
    "bloom": (  # a norm beside the blocks that is not the final one
        lambda: BloomForCausalLM(BloomConfig(vocab_size=11, hidden_size=16, n_layer=3, n_head=4)),
        "transformer.h.2.",
        "transformer.ln_f.",
    ),
    "mixtral": (  # as many experts as blocks
        lambda: MixtralForCausalLM(
            MixtralConfig(
                **SMALL, intermediate_size=24, num_key_value_heads=2, num_local_experts=LAYERS
            )
        ),
        "model.layers.2.",
        "model.norm.",
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_blocks_and_final_norm_of_other_architectures(family):
    build, block, norm = OTHERS[family]
    with torch.device("meta"):
        net = build()
    expected = {n for n, _ in net.named_parameters() if n.startswith((block, norm))}
    assert trained(net, 1) == expected
    assert any(n.startswith(block) for n in expected) and any(n.startswith(norm) for n in expected)


@pytest.mark.parametrize("k", [0, 4, 1.0, True])
def test_a_number_of_blocks_that_there_is_not_is_an_error(k):
    net = tiny_gpt2()
    with pytest.raises(InputError, match=f"^method.k={k}: a whole number of at least 1"):
        make("top_layers", net, k=k).attach(net)


def test_lists_of_blocks_must_be_one():
    net = tiny_llama()
    inner = nn.ModuleList(nn.Linear(1, 1) for _ in range(LAYERS))
    net.model.layers[0].experts = inner
    assert trained(net, 1) == {
        n for n, _ in net.named_parameters() if n.startswith(("model.layers.2.", "model.norm."))
    }
    net.second = nn.ModuleList(nn.Linear(1, 1) for _ in range(LAYERS))
    with pytest.raises(InputError, match=r"^model=\w+: .*'model.layers', 'second'"):
        trained(net, 1)

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import make, tiny_gpt2, tiny_llama
from peft import LNTuningConfig, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from peftlab.method import trainable

NAMES = {"llama": ["input_layernorm", "post_attention_layernorm", "norm"]}
NAMES["gpt2"] = ["ln_1", "ln_2", "ln_f"]


def step(net, tokens, optimizer):
    logits = net(input_ids=tokens, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


# peft 0.21 asks transformers 5.23 by a name that is going away
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # peft looks for in_features
def test_five_steps_are_those_of_hugging_face_peft(net, tokens, expect_close):
    base = net(tokens).logits
    config = LNTuningConfig(target_modules=NAMES[net.config.model_type])
    theirs = get_peft_model(deepcopy(net), config).eval()
    make("layernorm", net).attach(net)
    for model in (net, theirs):
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=0.03, weight_decay=0.0)
        for _ in range(5):
            step(model, tokens, optimizer)
    merged = theirs.merge_and_unload()
    assert (net(tokens).logits - base).abs().max() > 0.1
    expect_close(net(tokens).logits, merged(tokens).logits)
    state = merged.state_dict()
    for name, p in trainable(net):
        expect_close(p.detach(), state[name])


def test_names_and_counts_by_hand():
    net = tiny_llama()
    make("layernorm", net).attach(net)
    ends = ("input_layernorm", "post_attention_layernorm")
    expected = {f"model.layers.{i}.{end}.weight" for i in range(3) for end in ends}
    assert {name for name, _ in trainable(net)} == expected | {"model.norm.weight"}
    net = tiny_gpt2()
    make("layernorm", net).attach(net)
    assert sum(p.numel() for _, p in trainable(net)) == (2 * 3 + 1) * 2 * 16


def test_gemma_3_has_four_norms_per_block_and_two_more_per_attention():
    config = Gemma3TextConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
    )
    net = Gemma3ForCausalLM(config)
    make("layernorm", net, sites=["q"]).attach(net)
    assert sum(p.numel() for _, p in trainable(net)) == (4 * 3 + 1) * 16 + 3 * 2 * 4


def test_a_bf16_model_trains_float32_norms(tokens):
    net = tiny_gpt2().bfloat16()
    make("layernorm", net).attach(net)
    assert {p.dtype for _, p in trainable(net)} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        net(tokens).logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in trainable(net))
    assert net.get_parameter("transformer.h.0.attn.c_attn.weight").dtype == torch.bfloat16

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, tiny_gpt2, tiny_llama
from transformers import LlamaForCausalLM

from peftlab.errors import InputError
from peftlab.method import trainable


def loss_of(net, tokens):
    logits = net(tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def sgd_step(net, tokens, lr):
    loss_of(net, tokens).backward()
    torch.optim.SGD([p for _, p in trainable(net)], lr=lr).step()


@pytest.mark.parametrize("norms", [True, False])
def test_a_step_on_gpt2_is_the_gradient_of_its_biases(norms, tokens, expect_close):
    net = tiny_gpt2()
    by_hand = deepcopy(net).requires_grad_(True)
    biases = {n: p for n, p in by_hand.named_parameters() if n.endswith("bias")}
    if not norms:
        biases = {n: p for n, p in biases.items() if "ln_" not in n}
    grads = torch.autograd.grad(loss_of(by_hand, tokens), list(biases.values()))
    with torch.no_grad():
        for p, grad in zip(biases.values(), grads, strict=True):
            p.sub_(0.5 * grad)
    make("bitfit", net, norms=norms, create=False).attach(net)
    sgd_step(net, tokens, lr=0.5)
    assert {name for name, _ in trainable(net)} == set(biases)
    for name, p in net.named_parameters():
        expect_close(p.detach(), by_hand.get_parameter(name).detach(), atol=1e-6)


def test_a_step_on_llama_shifts_outputs_against_their_gradients(tokens, expect_close):
    net = tiny_llama()
    base = net(tokens).logits
    by_hand = deepcopy(net)
    outputs, shifts = {}, {}

    def keep(name, y):
        outputs[name] = y.requires_grad_() if y.is_leaf else y
        y.retain_grad()

    method = make("bitfit", net, create=True)
    hooks = [
        by_hand.get_submodule(s.name).register_forward_hook(lambda m, x, y, n=s.name: keep(n, y))
        for s in method.sites
    ]
    loss_of(by_hand, tokens).backward()
    for hook in hooks:
        hook.remove()
    for site in method.sites:
        shifts[site.name] = -0.5 * outputs[site.name].grad.sum((0, 1))
        by_hand.get_submodule(site.name).register_forward_hook(
            lambda m, x, y, n=site.name: y + shifts[n]
        )
    method.attach(net)
    sgd_step(net, tokens, lr=0.5)
    assert len(list(trainable(net))) == 7 * 3
    for site in method.sites:
        expect_close(site.module.bias.detach(), shifts[site.name], atol=1e-6)
    adapted = net(tokens).logits
    assert (adapted - base).abs().max() > 0.1
    expect_close(adapted, by_hand(tokens).logits)


def test_merged_it_is_a_llama_with_biases(tokens):
    net = tiny_llama()
    method = make("bitfit", net, create=True)
    method.attach(net)
    sgd_step(net, tokens, lr=0.5)
    adapted = net(tokens).logits
    method.merge(net)
    config = deepcopy(net.config)
    config.attention_bias = config.mlp_bias = True
    biased = LlamaForCausalLM(config).eval()
    biased.load_state_dict(net.state_dict())  # strict: the very same names
    assert torch.equal(biased(tokens).logits, adapted)


def test_detach_takes_only_created_biases():
    net, llama = tiny_gpt2(), tiny_llama()
    for backbone, sites in ((net, ["qkv"]), (llama, ["q", "up"])):
        keys = set(backbone.state_dict())
        method = make("bitfit", backbone, sites=sites, create=True)
        method.attach(backbone)
        created = set(backbone.state_dict()) - keys
        method.detach(backbone)
        assert set(backbone.state_dict()) == keys
        assert len(created) == (0 if backbone is net else 6)


def test_the_bias_of_a_key_has_no_gradient_without_rotation(tokens):
    net = tiny_gpt2()  # softmax does not see q · b_k, which all keys share
    make("bitfit", net, create=False).attach(net)
    loss_of(net, tokens).backward()
    for i in range(3):
        bias: Any = net.get_parameter(f"transformer.h.{i}.attn.c_attn.bias")
        q, k, v = bias.grad.abs().chunk(3)
        assert k.max() < 1e-5 * v.max() and q.max() > 1e-3 * v.max()


def test_a_model_without_biases_is_an_error_unless_they_are_created():
    with pytest.raises(InputError, match="^method.create=false: true for this model.*$"):
        make("bitfit", tiny_llama(), create=False)
    with pytest.raises(InputError, match="^method.norms=1: true or false$"):
        make("bitfit", tiny_gpt2(), norms=1)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_a_bf16_model_trains_float32_biases(build, tokens):
    net = build().bfloat16()
    make("bitfit", net, create=True).attach(net)
    assert {p.dtype for _, p in trainable(net)} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        net(tokens).logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in trainable(net))
    matrices = [p for n, p in net.named_parameters() if p.ndim == 2]
    assert {p.dtype for p in matrices} == {torch.bfloat16}

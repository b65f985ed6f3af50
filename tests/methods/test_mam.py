from copy import deepcopy

import pytest
import torch
from conftest import make, shake, tiny_gpt2, tiny_llama
from torch import nn

from peftlab.errors import InputError
from peftlab.method import trainable


class Beside(nn.Module):
    """The MLP and a scaled ReLU adapter on the same input."""

    def __init__(self, mlp, t, scale):
        super().__init__()
        self.mlp, self.t, self.scale = mlp, t, scale

    def forward(self, x):
        z = (x @ self.t.D.T + self.t.b_D).clamp(min=0) @ self.t.U.T + self.t.b_U
        return self.mlp(x) + self.scale * z


def shaken(net):
    method = make("mam", net, scale=1.5)
    method.attach(net)
    shake(method)
    return method


def alone(name, net, member, **changes):
    """Attach the method of that name with the tensors of a member."""
    method = make(name, net, **changes)
    method.load_state_dict(member.state_dict())
    method.attach(net)
    return method


def test_it_is_the_model_with_prefixes_and_with_adapters_beside_its_mlps(net, tokens, expect_close):
    surgery = deepcopy(net)
    base = net(tokens).logits
    method = shaken(net)
    prefix, adapter = method.members
    layers = surgery.model.layers if net.config.model_type == "llama" else surgery.transformer.h
    assert len(prefix.tensors) == len(adapter.tensors) == len(layers) == 3
    alone("prefix_tuning", surgery, prefix)
    only_prefix = surgery(tokens).logits
    for layer, t in zip(layers, adapter.tensors, strict=True):
        layer.mlp = Beside(layer.mlp, t, 1.5)
    logits = net(tokens).logits
    assert (logits - base).abs().max() > 0.1 and (logits - only_prefix).abs().max() > 0.1
    expect_close(logits, surgery(tokens).logits)


def test_each_component_alone_is_the_method_of_its_name(net, tokens):
    first, second = deepcopy(net), deepcopy(net)
    base = net(tokens).logits
    method = shaken(net)
    prefix, adapter = method.members
    alone("parallel_adapter", second, adapter, scale=1.5)
    adapted = second(tokens).logits
    prefix.unhook(net)
    assert torch.equal(net(tokens).logits, adapted)
    with torch.no_grad():
        for t in adapter.tensors:
            t.U.zero_()
            t.b_U.zero_()
    assert torch.equal(net(tokens).logits, base)
    prefix.hook(net)
    alone("prefix_tuning", first, prefix)
    prefixed = first(tokens).logits
    assert torch.equal(net(tokens).logits, prefixed)
    assert (adapted - base).abs().max() > 0.1 and (prefixed - base).abs().max() > 0.1


def test_count_is_the_sum_of_the_two(net):
    """By hand: length 3, hidden 5, bottleneck 3, width 16, three layers, d_kv 8 and 16."""
    counts = {}
    for name in ("mam", "prefix_tuning", "parallel_adapter"):
        other = deepcopy(net)
        make(name, other).attach(other)
        counts[name] = sum(p.numel() for _, p in trainable(other))
    d_kv = 8 if net.config.model_type == "llama" else 16
    assert counts["prefix_tuning"] == 3 * 16 + 5 * 17 + 3 * 2 * d_kv * 6
    assert counts["parallel_adapter"] == 3 * (2 * 3 * 16 + 3 + 16)
    assert counts["mam"] == counts["prefix_tuning"] + counts["parallel_adapter"]


def test_compact_keeps_prefixes_and_adapters_only(net, tokens):
    method = shaken(net)
    expected = net(tokens).logits
    for _ in range(2):
        method.compact()
        assert torch.equal(net(tokens).logits, expected)
    d_kv = 8 if net.config.model_type == "llama" else 16
    assert sum(p.numel() for p in method.parameters()) == 3 * (2 * 3 * d_kv + 2 * 3 * 16 + 3 + 16)


def test_generation_is_the_same_with_and_without_cache(net, tokens):
    shaken(net)
    greedy = tokens
    for _ in range(6):
        greedy = torch.cat([greedy, net(greedy, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    for use_cache in (True, False):
        out = net.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(out, greedy)


def test_bf16(net, tokens):
    shaken(net)
    expected = net(tokens).logits
    for p in net.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(tokens).logits
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    logits.float().square().sum().backward()
    for _, p in trainable(net):
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any()


@pytest.mark.parametrize(
    ("make_net", "changes", "line"),
    [
        (tiny_llama, {"sites": ["o"]}, "method.sites=o: o and down: the prefix needs the one, "),
        (tiny_llama, {"sites": ["q", "o", "down"]}, "method.sites=down, o, q: o and down: the "),
        (tiny_gpt2, {"sites": ["o", "down", "up"]}, "method.sites=down, o, up: o and down: the "),
        (tiny_llama, {"length": 0}, "method.length=0: a whole number of at least 1"),
        (tiny_llama, {"scale": 0}, "method.scale=0: a finite number above 0"),
        (tiny_llama, {"activation": "sine"}, "method.activation=sine: one of gelu, relu, swish"),
    ],
)
def test_bad_input(make_net, changes, line):
    with pytest.raises(InputError) as caught:
        make("mam", make_net(), **changes)
    assert str(caught.value).startswith(line)

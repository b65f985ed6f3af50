from copy import deepcopy

import pytest
import torch
from conftest import NETS, make, shake, tiny_llama
from torch import nn

from peftlab.errors import InputError
from peftlab.methods.pfeiffer import Pfeiffer
from peftlab.sites import Site


class Remembering(nn.Module):
    """The norm before the MLP, which sees the residual stream."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, h):
        self.residual = h
        return self.norm(h)


class Adapted(nn.Module):
    """The MLP with the adapter behind it, fed as AdapterHub does: output + residual stream."""

    def __init__(self, mlp, norm, t):
        super().__init__()
        self.mlp, self.norm, self.t = mlp, norm, t

    def forward(self, x):
        out = self.mlp(x)
        z = (out + self.norm.residual) @ self.t.D.T + self.t.b_D
        return out + z.clamp(min=0) @ self.t.U.T + self.t.b_U


def test_it_is_the_model_with_an_adapter_that_sees_the_residual(net, tokens, expect_close):
    base = net(tokens).logits
    surgery = deepcopy(net)
    method = make("pfeiffer", net)
    method.attach(net)
    shake(method)
    llama = net.config.model_type == "llama"
    layers = surgery.model.layers if llama else surgery.transformer.h
    before = "post_attention_layernorm" if llama else "ln_2"
    assert len(method.tensors) == len(layers) == 3
    for layer, t in zip(layers, method.tensors, strict=True):
        norm = Remembering(getattr(layer, before))
        setattr(layer, before, norm)
        layer.mlp = Adapted(layer.mlp, norm, t)
    logits = net(tokens).logits
    assert (logits - base).abs().max() > 0.1
    expect_close(logits, surgery(tokens).logits)


def test_with_the_plain_input_it_is_houlsbys_without_the_attention_adapters(net, tokens):
    other = deepcopy(net)
    plain = make("pfeiffer", net, input_with_residual=False)
    houlsby = make("houlsby", other, activation="relu")
    plain.attach(net)
    houlsby.attach(other)
    shake(plain)
    of_site = {s.name: t for s, t in zip(plain.sites, plain.tensors, strict=True)}
    with torch.no_grad():
        for site, t in zip(houlsby.sites, houlsby.tensors, strict=True):
            if site.kind == "o":
                t.U.zero_()
            for name, p in vars(of_site.get(site.name, t)).items():
                getattr(t, name).copy_(p)
    expected = other(tokens).logits
    assert torch.equal(net(tokens).logits, expected)
    plain.detach(net)
    plain.input_with_residual = True
    plain.attach(net)
    assert not torch.allclose(net(tokens).logits, expected, atol=1e-2)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("with_residual", [True, False])
def test_a_zeroed_adapter_is_none(kind, with_residual, tokens):
    net = NETS[kind]()
    base = net(tokens).logits
    method = make("pfeiffer", net, input_with_residual=with_residual)
    method.attach(net)
    shake(method)
    with torch.no_grad():
        for t in method.tensors:
            t.U.zero_()
    assert not torch.equal(net(tokens).logits, base)
    with torch.no_grad():
        for t in method.tensors:
            t.b_U.zero_()
    assert torch.equal(net(tokens).logits, base)


def test_a_gradient_passes_the_layers_above(tokens):
    net = tiny_llama()
    method = make("pfeiffer", net)
    method.attach(net)
    net(tokens).logits.square().sum().backward()
    assert all(t.b_U.grad.abs().max() > 0 for t in method.tensors)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sites": "o"}, "method.sites=o: this adapter belongs to the kind down"),
        ({"input_with_residual": 1}, "method.input_with_residual=1: true or false"),
    ],
)
def test_bad_input(changes, line):
    with pytest.raises(InputError) as caught:
        make("pfeiffer", tiny_llama(), **changes)
    assert str(caught.value) == line


def test_a_site_outside_of_the_layers_is_refused():
    linear = nn.Linear(3, 3)
    site = Site("mlp.down", "down", linear)
    method = Pfeiffer([site], bottleneck=2, activation="relu", std=0.02, input_with_residual=True)
    with pytest.raises(InputError, match="method.sites=mlp.down: the site stands in no numbered"):
        method.attach(nn.Sequential(linear))

from copy import deepcopy

import pytest
import torch
from conftest import make, shake, tiny_gpt2, tiny_llama
from torch import nn

from peftlab.errors import InputError

PHI = {  # by hand
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "relu": lambda z: z.clamp(min=0),
    "swish": lambda z: z / (1 + torch.exp(-z)),
    "tanh": lambda z: 1 - 2 / (torch.exp(2 * z) + 1),
}


class Adapted(nn.Module):
    """A whole sublayer with the adapter behind it: surgery instead of a hook."""

    def __init__(self, sublayer, t, phi):
        super().__init__()
        self.sublayer, self.t, self.phi = sublayer, t, phi

    def forward(self, *args, **kwargs):
        out = self.sublayer(*args, **kwargs)
        h, *rest = out if isinstance(out, tuple) else (out,)
        h = h + self.phi(h @ self.t.D.T + self.t.b_D) @ self.t.U.T + self.t.b_U
        return (h, *rest) if rest else h


def layers_of(net):
    return net.model.layers if net.config.model_type == "llama" else net.transformer.h


@pytest.mark.parametrize("activation", PHI)
def test_it_is_the_model_with_adapters_between_sublayer_and_residual(
    net, activation, tokens, expect_close
):
    base = net(tokens).logits
    surgery = deepcopy(net)
    method = make("houlsby", net, activation=activation)
    method.attach(net)
    shake(method, 0.3)
    of_site = {s.name: t for s, t in zip(method.sites, method.tensors, strict=True)}
    assert len(of_site) == 6
    attention, names = (
        ("self_attn", ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"))
        if net.config.model_type == "llama"
        else ("attn", ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"))
    )
    for i, layer in enumerate(layers_of(surgery)):
        for sublayer, name in zip((attention, "mlp"), names, strict=True):
            t = of_site[name.format(i)]
            setattr(layer, sublayer, Adapted(getattr(layer, sublayer), t, PHI[activation]))
    logits = net(tokens).logits
    assert (logits - base).abs().max() > 0.1
    expect_close(logits, surgery(tokens).logits)


def test_a_layer_with_zeroed_adapters_is_a_layer_without(net, tokens):
    method = make("houlsby", net)
    method.attach(net)
    shake(method)
    full = net(tokens).logits
    for handle in method.handles:
        handle.remove()
    method.handles.clear()
    for site, t in zip(method.sites, method.tensors, strict=True):
        if ".1." not in site.name:
            hook = lambda m, a, y, t=t: method(t, m, a[0], y)  # noqa: E731
            method.handles.append(site.module.register_forward_hook(hook))
    without = net(tokens).logits
    method.detach(net)
    with torch.no_grad():
        for site, t in zip(method.sites, method.tensors, strict=True):
            if ".1." in site.name:
                t.U.zero_()
                t.b_U.zero_()
    method.attach(net)
    assert torch.equal(net(tokens).logits, without)
    assert not torch.allclose(full, without, atol=1e-3)


def test_start():
    method = make("houlsby", tiny_llama(), bottleneck=500, std=0.05)
    for t in method.tensors:
        assert t.D.shape == (500, 16) and t.U.shape == (16, 500)
        assert 0.099 < t.D.abs().max() <= 0.1
        # the standard deviation of a normal cut at two of its own
        assert t.D.std().item() == pytest.approx(0.05 * 0.8796, rel=0.03)
        assert not t.U.any() and not t.b_U.any() and not t.b_D.any()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sites": "all"}, "method.sites=qkv: this adapter belongs to the kind o or down"),
        ({"bottleneck": 0}, "method.bottleneck=0: a whole number of at least 1"),
        ({"activation": "mish"}, "method.activation=mish: one of gelu, relu, swish, tanh"),
        ({"std": 0.0}, "method.std=0.0: a finite number above 0"),
    ],
)
def test_bad_input(changes, line):
    with pytest.raises(InputError) as caught:
        make("houlsby", tiny_gpt2(), **changes)
    assert str(caught.value) == line

from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import make, shake, tiny_gpt2, tiny_llama
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from peftlab.errors import InputError
from peftlab.methods.parallel_adapter import ParallelAdapter
from peftlab.sites import FAMILIES, find_sites


class Beside(nn.Module):
    """The MLP and the adapter on the same input."""

    def __init__(self, mlp, t, scale):
        super().__init__()
        self.mlp, self.t, self.scale = mlp, t, scale

    def forward(self, x):
        z = (x @ self.t.D.T + self.t.b_D).clamp(min=0) @ self.t.U.T + self.t.b_U
        return self.mlp(x) + self.scale * z


def test_it_is_the_model_with_an_adapter_beside_each_mlp(net, tokens, expect_close):
    base = net(tokens).logits
    surgery = deepcopy(net)
    method = make("parallel_adapter", net, scale=1.5)
    method.attach(net)
    shake(method)
    layers = surgery.model.layers if net.config.model_type == "llama" else surgery.transformer.h
    assert len(method.tensors) == len(layers) == 3
    for layer, t in zip(layers, method.tensors, strict=True):
        layer.mlp = Beside(layer.mlp, t, 1.5)
    logits = net(tokens).logits
    assert (logits - base).abs().max() > 0.1
    expect_close(logits, surgery(tokens).logits)


def test_the_change_is_linear_in_scale(expect_close):
    changes = []
    for scale in (1.0, 3.0):
        net = tiny_llama(1)
        mlp: Any = net.model.layers[0].mlp
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(7))
        bare = mlp(x)
        method = make("parallel_adapter", net, scale=scale)
        method.attach(net)
        shake(method)
        changes.append(mlp(x) - bare)
    assert changes[0].abs().max() > 1e-2
    expect_close(changes[1], 3 * changes[0])


def test_the_mlp_itself_with_its_sign_turned_cancels_it(expect_close):
    net = tiny_gpt2(1)
    mlp: Any = net.transformer.h[0].mlp
    mlp.act = nn.ReLU()
    method = make("parallel_adapter", net, bottleneck=64, scale=1.0)
    method.attach(net)
    (t,) = method.tensors
    with torch.no_grad():
        t.D.copy_(mlp.c_fc.weight)
        t.b_D.copy_(mlp.c_fc.bias)
        t.U.copy_(-mlp.c_proj.weight)
        t.b_U.copy_(-mlp.c_proj.bias)
    x = torch.randn(2, 5, 16)
    expect_close(mlp(x), torch.zeros(2, 5, 16))


def test_start():
    method = make("parallel_adapter", tiny_llama(), bottleneck=500)
    for t in method.tensors:
        assert 0.249 < t.D.abs().max() <= 0.25  # 1 / √16
        assert not t.U.any() and not t.b_U.any() and not t.b_D.any()


def test_an_mlp_that_is_no_module_is_refused():
    config = OPTConfig(
        vocab_size=11, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=4
    )
    net = OPTForCausalLM(config)
    sites = find_sites(net, FAMILIES["opt"], ["down"])
    method = ParallelAdapter(sites, bottleneck=2, activation="relu", scale=1.0)
    with pytest.raises(InputError) as caught:
        method.attach(net)
    line = "method.sites=model.decoder.layers.0.fc2: this model's MLP is no module of its own"
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sites": "up"}, "method.sites=up: this adapter belongs to the kind down"),
        ({"scale": -1}, "method.scale=-1: a finite number above 0"),
    ],
)
def test_bad_input(changes, line):
    with pytest.raises(InputError) as caught:
        make("parallel_adapter", tiny_llama(), **changes)
    assert str(caught.value) == line

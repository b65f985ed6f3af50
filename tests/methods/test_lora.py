import math

import torch
from conftest import make, shake, tiny_llama
from torch import nn

from peftlab.methods.lora import LoRA
from peftlab.sites import Site


def by_hand():
    """One layer of three inputs and two outputs, rank 1, scale 4."""
    layer = nn.Linear(3, 2, bias=False)
    method = LoRA([Site("layer", "q", layer)], rank=1, alpha=4.0, dropout=0.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]))
        method.tensors[0].A.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    return layer, method


def test_numbers_by_hand():
    layer, method = by_hand()
    (t,) = method.tensors
    with torch.no_grad():
        t.B.copy_(torch.tensor([[0.5], [-1.0]]))
        x = torch.tensor([[1.0, 1.0, 1.0]])
        expected = torch.tensor([[3.0, 4.0, 8.0], [-4.0, -7.0, -13.0]])  # W + 4 B A
        assert torch.equal(method.weight(t, layer.weight), expected)
        assert torch.equal(method(t, layer, x, layer(x)), torch.tensor([[15.0, -24.0]]))


def test_gradients_at_step_0_by_hand():
    layer, method = by_hand()
    (t,) = method.tensors
    x = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]])  # A x = 4, 4
    upstream = torch.tensor([[1.0, 0.0], [0.5, -2.0]])
    method(t, layer, x, layer(x)).backward(upstream)
    assert not t.A.grad.any()  # B = 0
    # s Σ g (A x): 4 (1 * 4 + 0.5 * 4), 4 (0 * 4 - 2 * 4)
    assert torch.equal(t.B.grad, torch.tensor([[24.0], [-32.0]]))


def test_change_has_at_most_the_rank():
    method = make("lora", tiny_llama(), rank=3)
    shake(method)
    for site, t in zip(method.sites, method.tensors, strict=True):
        W = site.module.weight
        assert torch.linalg.matrix_rank(method.weight(t, W) - W, atol=1e-4) == 3


def test_a_is_uniform_up_to_one_over_the_root_of_the_fan_in():
    method = make("lora", tiny_llama(), rank=8)
    for kind, d_in in (("q", 16), ("down", 24)):
        drawn = torch.cat(
            [
                t.A.flatten()
                for s, t in zip(method.sites, method.tensors, strict=True)
                if s.kind == kind
            ]
        )
        assert 0.97 / math.sqrt(d_in) < drawn.abs().max() <= 1 / math.sqrt(d_in)
        assert abs(drawn.std() * math.sqrt(3 * d_in) - 1) < 0.1

from types import SimpleNamespace

import pytest
import torch
from conftest import make, shake, tiny_llama
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError

from peftlab.method import WeightMethod
from peftlab.methods.dora import DoRA
from peftlab.sites import Site


def shaken(detach_norm=True):
    method = make("dora", tiny_llama(), detach_norm=detach_norm)
    shake(method, std=0.3)
    return method


def test_rows_have_the_norm_m():
    method = shaken()
    for site, t in zip(method.sites, method.tensors, strict=True):
        with torch.no_grad():
            t.m[0] = -2.0  # a magnitude may change sign
            rows = method.weight(t, site.module.weight).norm(dim=1)
            torch.testing.assert_close(rows, t.m.abs())


@pytest.mark.parametrize("size", [1e-3, 0.1])  # of B's entries: the change is small, and large
def test_the_norm_without_the_product_is_exact_to_1e_6(size):
    d_in, d_out, rank = 576, 1536, 8  # SmolLM2's gate
    draw = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(d_in, d_out, bias=False)
    layer.weight.data = torch.randn(d_out, d_in, generator=draw) * 0.1
    site = Site("gate", "gate", layer)
    method = DoRA([site], rank=rank, alpha=16.0, detach_norm=True, dropout=0.0)
    (t,) = method.tensors
    t.B.data = torch.randn(d_out, rank, generator=draw) * size
    exact = (layer.weight.double() + 2.0 * t.B.double() @ t.A.double()).norm(dim=1)
    change = (exact / layer.weight.double().norm(dim=1) - 1).abs().max()
    found = method.norm(t, layer.weight).double()
    assert change > size / 10
    assert ((found - exact) / exact).abs().max() < 1e-6


def test_m_starts_as_the_norm_of_the_rows():
    method = make("dora", tiny_llama())
    for site, t in zip(method.sites, method.tensors, strict=True):
        torch.testing.assert_close(t.m.detach(), site.module.weight.square().sum(1).sqrt())


def test_detaching_the_norm_changes_the_gradient_of_the_factors_only():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    probe = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    outputs, grads = [], []
    for detach_norm in (True, False):
        method = shaken(detach_norm)
        site, t = method.sites[0].module, method.tensors[0]
        y = method(t, site, x, site(x))
        (y * probe).sum().backward()
        outputs.append(y)
        grads.append((t.A.grad, t.B.grad, t.m.grad))
    assert torch.equal(*outputs)
    (A, B, m), (A_whole, B_whole, m_whole) = grads
    assert torch.equal(m, m_whole)
    assert (A - A_whole).abs().max() > 0.05 and (B - B_whole).abs().max() > 0.05


@pytest.mark.parametrize("detach_norm", [True, False])
def test_only_the_whole_gradient_is_that_of_the_function(detach_norm):
    method = shaken(detach_norm)
    t, W = method.tensors[1], method.sites[1].module.weight.double()

    def function(A, B, m):
        return method.weight(SimpleNamespace(A=A, B=B, m=m), W)

    inputs = [p.detach().double().requires_grad_() for p in (t.A, t.B, t.m)]
    if detach_norm:
        with pytest.raises(GradcheckError):
            gradcheck(function, inputs)
    else:
        assert gradcheck(function, inputs)


def test_the_whole_gradient_of_the_norm_without_the_product_is_the_literal_one():
    method = shaken(detach_norm=False)
    site, t = method.sites[6].module, method.tensors[6]
    x = torch.randn(5, site.in_features)
    probe = torch.randn(5, site.out_features)
    grads = []
    for forward in (method.forward, lambda *a: WeightMethod.forward(method, *a)):
        method.zero_grad()
        (forward(t, site, x, site(x)) * probe).sum().backward()
        grads.append([p.grad.clone() for p in (t.A, t.B, t.m)])
    for factored, literal in zip(*grads, strict=True):
        torch.testing.assert_close(factored, literal, atol=1e-4, rtol=1e-4)

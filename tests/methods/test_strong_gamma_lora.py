import math

import torch
from conftest import make, tiny_llama
from torch import nn

GAMMA, ALPHA, RANK = 10.0, 3.0, 4


def method_with_std(std):
    method = make("strong_gamma_lora", tiny_llama(), gamma=GAMMA, alpha=ALPHA, rank=RANK)
    torch.manual_seed(7)
    for t in method.tensors:
        nn.init.normal_(t.B, std=std)
    return method


def changes(method):
    return [
        (method.weight(t, s.module.weight) - s.module.weight).detach()
        for s, t in zip(method.sites, method.tensors, strict=True)
    ]


def test_once_b_is_large_its_size_does_not_matter():
    method = method_with_std(0.5)
    first = changes(method)
    for c in (0.5, 1.0, 40.0):  # RMS(B) stays above 1/γ = 0.1
        with torch.no_grad():
            for t in method.tensors:
                t.B.mul_(c)
        for change, expected in zip(changes(method), first, strict=True):
            torch.testing.assert_close(change, expected, atol=1e-6, rtol=1e-5)


def test_large_b_is_divided_by_its_rms():
    method = method_with_std(0.5)
    for t, change in zip(method.tensors, changes(method), strict=True):
        s = ALPHA / math.sqrt(RANK) / t.B.square().mean().sqrt()
        torch.testing.assert_close(change, s * t.B @ t.A, atol=1e-6, rtol=1e-5)


def test_small_b_is_multiplied_by_gamma():
    method = method_with_std(0.05)
    for t, change in zip(method.tensors, changes(method), strict=True):
        s = GAMMA * ALPHA / math.sqrt(RANK)
        torch.testing.assert_close(change, s * t.B @ t.A, atol=1e-6, rtol=1e-5)


def test_the_size_is_a_constant_in_backward():
    method = method_with_std(0.5)
    site, t = method.sites[0].module, method.tensors[0]
    method.weight(t, site.weight).sum().backward()
    s = ALPHA / math.sqrt(RANK) / t.B.square().mean().sqrt()
    expected = (s * t.A.sum(1)).expand(16, RANK)  # no term of 1 / RMS(B)
    torch.testing.assert_close(t.B.grad, expected.detach())

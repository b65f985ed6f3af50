import math

import torch
from conftest import make, shake, tiny_llama


def test_weight_is_the_product_of_its_definition():
    method = make("svdora", tiny_llama(), r_u=3, r_v=2, alpha=5.0, gamma=2.0)
    shake(method)
    for site, t in zip(method.sites, method.tensors, strict=True):
        P, s, Q = torch.linalg.svd(site.module.weight, full_matrices=False)
        torch.testing.assert_close(t.P @ (s[:, None] * t.Q), P @ (s[:, None] * Q))
        k = min(site.d_in, site.d_out)
        s_in, s_out = 10 / math.sqrt(3 * k), 10 / math.sqrt(2 * k)
        left, right = t.P + s_out * t.B_out @ t.A_out, t.Q + s_in * t.B_in @ t.A_in
        expected = left @ torch.diag(t.sigma) @ right
        actual = method.weight(t, site.module.weight)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_sigma_starts_as_the_singular_values():
    method = make("svdora", tiny_llama())
    for site, t in zip(method.sites, method.tensors, strict=True):
        torch.testing.assert_close(t.sigma.detach(), torch.linalg.svdvals(site.module.weight))

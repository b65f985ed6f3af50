import torch
from conftest import make, shake, tiny_gpt2


def test_without_a_product_it_rescales_the_outputs():
    net = tiny_gpt2()
    method = make("simple_dora", net, beta=5.0)
    for site, t in zip(method.sites, method.tensors, strict=True):
        with torch.no_grad():
            t.m.copy_(torch.linspace(-1, 2, site.d_out))
            x = torch.randn(3, site.d_in)
            y = method(t, site.module, x, site.module(x))
            expected = 5 * t.m * (x @ site.module.weight.T) + site.module.bias
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_a_row_of_zeros_stays_finite_and_frozen():
    net = tiny_gpt2()
    with torch.no_grad():
        net.get_parameter("transformer.h.0.attn.c_attn.weight")[3] = 0
    method = make("simple_dora", net)
    shake(method)
    W = method.weight(method.tensors[0], method.sites[0].module.weight)
    assert W.isfinite().all() and not W[3].any() and W[2].any()

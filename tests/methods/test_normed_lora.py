import pytest
import torch
from conftest import make, shake, tiny_gpt2


@pytest.mark.parametrize("c", [0.01, 7.0])
def test_scaling_the_weights_scales_their_change(c):
    net, scaled = tiny_gpt2(), tiny_gpt2()
    with torch.no_grad():
        for site in make("normed_lora", scaled).sites:
            site.module.weight.mul_(c)
    one, other = make("normed_lora", net), make("normed_lora", scaled)
    for method in (one, other):
        shake(method)
    for site, a, b in zip(one.sites, one.tensors, other.tensors, strict=True):
        W = site.module.weight
        change = one.weight(a, torch.zeros_like(W))
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(other.weight(b, torch.zeros_like(W)), c * change)


def test_the_size_of_the_weights_is_remembered():
    net = tiny_gpt2()
    method = make("normed_lora", net)
    sizes = [site.module.weight.square().mean().sqrt() for site in method.sites]
    method.attach(net)
    shake(method, std=1.0)
    method.merge(net)
    for site, t, size in zip(method.sites, method.tensors, sizes, strict=True):
        torch.testing.assert_close(t.nu, size)
        assert not torch.isclose(site.module.weight.square().mean().sqrt(), size, rtol=1e-3)
    assert sum(name.startswith("nu.") for name in method.state_dict()) == len(method.sites)

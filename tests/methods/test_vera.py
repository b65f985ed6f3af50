import math

import torch
from conftest import make, tiny_llama

from peftlab.method import trainable


def test_every_site_takes_the_corner_of_one_frozen_pair():
    net = tiny_llama()
    method = make("vera", net, rank=32)
    method.attach(net)
    assert method.A.shape == (32, 24) and method.B.shape == (24, 32)
    for site, t in zip(method.sites, method.tensors, strict=True):
        down, up = method.factors(t)  # b = 0 hides B: set it to 1
        assert torch.equal(down, 0.1 * method.A[:, : site.d_in]) and not up.any()
        torch.nn.init.ones_(t.b)
        assert torch.equal(method.factors(t)[1], method.B[: site.d_out])
    assert {name.split(".")[1] for name, _ in trainable(net)} == {"b", "d"}
    assert {"A", "B"} <= set(method.state_dict())


def test_start():
    method = make("vera", tiny_llama(), rank=32, d_initial=0.25)
    assert all((t.d == 0.25).all() and not t.b.any() for t in method.tensors)
    for pair, fan_in in ((method.A, 24), (method.B, 32)):  # Kaiming uniform with gain √2
        bound = math.sqrt(6 / fan_in)
        assert 0.97 * bound < pair.abs().max() <= bound

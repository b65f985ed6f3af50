import math

import torch
from conftest import make, shake, tiny_llama


def test_it_is_lora_with_alpha_times_the_root_of_the_rank(tokens, expect_close):
    logits = []
    for name, alpha in (("rslora", 3.0), ("lora", 3.0 * math.sqrt(8))):
        net = tiny_llama()
        method = make(name, net, rank=8, alpha=alpha)
        method.attach(net)
        shake(method)
        logits.append(net(tokens).logits)
    expect_close(*logits, atol=1e-6)


def test_change_of_random_factors_does_not_shrink_with_the_rank():
    sizes = {}
    for rank in (1, 4):
        method = make("rslora", tiny_llama(layers=8), rank=rank)
        for p in method.parameters():
            torch.nn.init.normal_(p)
        changes = [
            method.weight(t, s.module.weight) - s.module.weight
            for s, t in zip(method.sites, method.tensors, strict=True)
        ]
        sizes[rank] = torch.cat([change.flatten() for change in changes]).std().item()
    assert 0.9 < sizes[4] / sizes[1] < 1.1

import torch
import torch.nn.functional as F
from conftest import make, shake, tiny_gpt2


def loss_of(net, tokens):
    logits = net(tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def test_the_gradient_of_a_tied_tensor_is_the_sum_over_the_layers(tokens, expect_close):
    net, plain = tiny_gpt2(), tiny_gpt2()
    tied = make("tied_lora", net, u=True, v=True)
    lora = make("lora", plain, alpha=4.0)  # scale 1
    tied.attach(net)
    lora.attach(plain)
    shake(tied)
    with torch.no_grad():
        for t, own in zip(tied.tensors, lora.tensors, strict=True):
            down, up = tied.factors(t)
            own.A.copy_(down)
            own.B.copy_(up)
    for model in (net, plain):
        loss_of(model, tokens).backward()
    for kind in ("qkv", "o", "up", "down"):
        layers = [
            (t, own)
            for site, t, own in zip(tied.sites, tied.tensors, lora.tensors, strict=True)
            if site.kind == kind
        ]
        A, B = layers[0][0].A, layers[0][0].B
        assert A.grad.abs().max() > 1e-3 and B.grad.abs().max() > 1e-3
        expect_close(A.grad, sum(t.u[:, None] * own.A.grad for t, own in layers), atol=1e-6)
        sum_B = sum(tied.scale * t.nu * t.v[:, None] * own.B.grad for t, own in layers)
        expect_close(B.grad, sum_B, atol=1e-6)


def test_layers_of_one_kind_share_their_factors_and_kinds_do_not():
    method = make("tied_lora", tiny_gpt2())
    kinds = {}
    for site, t in zip(method.sites, method.tensors, strict=True):
        kinds.setdefault(site.kind, set()).add((id(t.A), id(t.B)))
    assert all(len(pairs) == 1 for pairs in kinds.values())
    assert len(set.union(*kinds.values())) == 4
    assert len({id(t.u) for t in method.tensors}) == len(method.sites) == 12

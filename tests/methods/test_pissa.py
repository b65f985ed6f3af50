import torch
from conftest import make, shake, tiny_gpt2


def test_the_frozen_rest_is_what_the_principal_part_leaves():
    method = make("pissa", tiny_gpt2(), rank=4, alpha=6.0)
    for site, t in zip(method.sites, method.tensors, strict=True):
        W = site.module.weight
        sigma = torch.linalg.svdvals(W.double())
        rest = torch.linalg.svdvals((W - 1.5 * t.B @ t.A).double())  # s = 6 / 4
        expected = torch.cat((sigma[4:], torch.zeros(4)))
        torch.testing.assert_close(rest, expected, atol=1e-5, rtol=0)


def test_both_factors_carry_the_same_share():
    method = make("pissa", tiny_gpt2(), rank=4, alpha=6.0)
    for t in method.tensors:
        torch.testing.assert_close(t.A.norm(dim=1), t.B.norm(dim=0))


def test_it_converts_to_a_lora_of_twice_the_rank(tokens, expect_close):
    net, plain = tiny_gpt2(), tiny_gpt2()
    pissa = make("pissa", net, rank=4, alpha=6.0)
    pissa.attach(net)
    start = [(t.A.detach().clone(), t.B.detach().clone()) for t in pissa.tensors]
    shake(pissa)
    lora = make("lora", plain, rank=8, alpha=12.0)  # the same scale, 1.5
    lora.attach(plain)
    with torch.no_grad():
        for t, own, (A0, B0) in zip(pissa.tensors, lora.tensors, start, strict=True):
            own.A.copy_(torch.cat((t.A, A0)))
            own.B.copy_(torch.cat((t.B, -B0), dim=1))
    base = tiny_gpt2()(tokens).logits
    assert (net(tokens).logits - base).abs().max() > 1e-2
    expect_close(net(tokens).logits, plain(tokens).logits)

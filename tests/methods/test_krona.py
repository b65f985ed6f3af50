import pytest
import torch
import torch.nn.functional as F
from conftest import make, shake, tiny_gpt2, tiny_llama

from peftlab.errors import InputError
from peftlab.sizes import kron_sizes, split


def test_a_number_is_split_at_the_divisor_nearest_below_its_root_or_at_the_factor():
    assert [split(n, -1) for n in (1, 7, 12, 16, 768)] == [(1, 1), (1, 7), (3, 4), (4, 4), (24, 32)]
    assert [split(12, f) for f in (1, 2, 5, 6, 7, 12, 99)] == [
        (1, 12),
        (2, 6),
        (3, 4),
        (6, 2),
        (3, 4),
        (12, 1),
        (3, 4),
    ]
    assert kron_sizes(48, 16, -1, 8) == (6, 8, 8, 2)


@pytest.mark.parametrize("a_1", [-1, 2, 8])
@pytest.mark.parametrize("a_2", [-1, 1, 4])
def test_forward_is_the_dense_kronecker_product(net, a_1, a_2):
    method = make("krona", net, a_1=a_1, a_2=a_2, scale=3.0)
    shake(method, std=0.5)
    for site, t in zip(method.sites, method.tensors, strict=True):
        A, B = t.A.detach(), t.B.detach()
        assert A.shape[0] * B.shape[0] == site.d_out and A.shape[1] * B.shape[1] == site.d_in
        assert a_1 in (-1, A.shape[1]) and a_2 in (-1, A.shape[0])
        product = torch.empty(site.d_out, site.d_in)
        for i in range(A.shape[0]):  # block by block, not torch.kron
            for k in range(A.shape[1]):
                rows = slice(i * B.shape[0], (i + 1) * B.shape[0])
                columns = slice(k * B.shape[1], (k + 1) * B.shape[1])
                product[rows, columns] = A[i, k] * B
        assert torch.equal(product, torch.kron(A, B))
        x = torch.randn(2, 5, site.d_in)
        y = site.module(x)
        expected = F.linear(x, site.module.weight + 3 * product, site.module.bias)
        assert (expected - y).abs().max() > 0.1
        torch.testing.assert_close(
            method(t, site.module, x, y), expected, atol=1e-4, rtol=1e-4
        )  # sums of up to 24 products of size 3 in another order


def test_rank_of_the_change_is_the_product_of_the_ranks():
    net = tiny_llama()
    method = make("krona", net, sites=["q"])
    t, W = method.tensors[0], method.sites[0].module.weight
    for rank_A, rank_B in ((1, 1), (2, 3), (4, 3), (4, 4)):
        for p, rank in ((t.A, rank_A), (t.B, rank_B)):
            rotation = torch.linalg.qr(torch.randn(4, 4)).Q
            p.data = rotation[:, :rank] @ rotation[:, :rank].T  # singular values 1 and 0
        change = method.weight(t, W) - W
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == rank_A * rank_B


def test_a_1_by_1_factor_pair_of_vectors_is_lora_of_rank_1():
    method = make("krona", tiny_llama(), sites=["up"], a_1=16, a_2=1)
    shake(method)
    t, W = method.tensors[0], method.sites[0].module.weight
    assert t.A.shape == (1, 16) and t.B.shape == (24, 1)
    torch.testing.assert_close(method.weight(t, W), W + torch.outer(t.B[:, 0], t.A[0]))


def test_start():
    method = make("krona", tiny_gpt2())
    assert not any(t.B.any() for t in method.tensors)
    for inner in {t.A.shape[1] for t in method.tensors}:
        entries = torch.cat([t.A.flatten() for t in method.tensors if t.A.shape[1] == inner])
        spread = 4 * entries.numel() ** -0.5  # of the measured standard deviation, 5 sigma
        assert entries.std().item() * inner**0.5 == pytest.approx(1, abs=spread)
        assert abs(entries.mean().item()) * inner**0.5 < spread


@pytest.mark.parametrize("key", ["a_1", "a_2"])
@pytest.mark.parametrize("value", [0, -2, 2.0, True, "many"])
def test_sizes_that_are_none(key, value):
    with pytest.raises(InputError, match=rf"method\.{key}={value}: -1 .* whole number"):
        make("krona", tiny_llama(), **{key: value})


def test_sizes_that_do_not_divide():
    with pytest.raises(InputError, match=r"method\.a_1=5: -1, or a divisor of 16 \(.*q_proj\)"):
        make("krona", tiny_llama(), a_1=5)
    with pytest.raises(InputError, match=r"method\.a_2=16: -1, or a divisor of 8 \(.*k_proj\)"):
        make("krona", tiny_llama(), a_2=16)

"""DID and SAID: Fastfood against the dense formula, and what it is good for."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import attach, make, shake, tiny_gpt2, tiny_llama
from scipy.linalg import hadamard

from peftlab import fastfood
from peftlab.checkpoint import adapter_tensors, load_adapter, save_adapter
from peftlab.errors import InputError


def parts_of(method, t):
    return fastfood.Map(t.B, t.pi, t.G)


def dense(parts, d, D):
    """P [D, d] in double precision by the formula: H G Π H B, cut, with n by n matrices."""
    n = len(parts.G)
    H = hadamard(n).astype(float)
    B = np.diag(np.r_[parts.B.numpy().astype(float), np.zeros(n - d)])
    # Π is kept modulo m, which is as good as Π where H B z repeats itself every m entries
    Pi = np.zeros((n, n))
    Pi[np.arange(n), parts.pi.numpy()] = 1
    return torch.tensor(H @ np.diag(parts.G.double().numpy()) @ Pi @ H @ B)[:D, :d]


@pytest.mark.parametrize("n", [1, 2, 16, 32, 64, 2048])
def test_transform_is_hadamards_matrix(n):
    x = torch.randn(n, dtype=torch.float64, requires_grad=True)
    H = fastfood.hadamard(fastfood.RADIX).double()
    expected = torch.tensor(hadamard(n), dtype=torch.float64)
    y = fastfood.transform(x, H)
    torch.testing.assert_close(y, expected @ x)
    probe = torch.randn(n, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(y @ probe, x)
    torch.testing.assert_close(gradient, expected.T @ probe)


def test_the_whole_permutation_is_needed_modulo_m_only():
    d, D = 11, 60  # n = 64, m = 16
    z, order = torch.randn(d).double(), torch.randperm(64)
    B = torch.randint(2, (d,)).double() * 2 - 1
    before = torch.tensor(hadamard(64)).double() @ F.pad(B * z, (0, 64 - d))
    short = torch.tensor(hadamard(16)).double() @ F.pad(B * z, (0, 16 - d))
    torch.testing.assert_close(before[order], short[order % 16])
    generator = torch.Generator().manual_seed(0)
    pi = fastfood.draw(d, D, generator).pi
    assert torch.equal(pi.bincount(), torch.full((16,), 4))  # of a permutation of 64


@pytest.mark.parametrize("name", ["did", "said"])
def test_output_and_gradients_are_those_of_the_dense_map(name):
    net = tiny_gpt2(layers=1)
    method = make(name, net, dimension=50)
    shake(method)
    z = method.z.detach().double().requires_grad_()
    for site, t in zip(method.sites, method.tensors, strict=True):
        W = site.module.weight
        P = dense(parts_of(method, t), 50, W.numel())
        share = t.lambda_.detach().double() if name == "said" else torch.ones(())
        share = share.clone().requires_grad_(name == "said")
        expected = W.double() + share * (P @ z).view_as(W)
        actual = method.weight(t, W)
        torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-5)
        probe = torch.randn_like(W)
        trained = [method.z, t.lambda_] if name == "said" else [method.z]
        ours = torch.autograd.grad((actual * probe).sum(), trained)
        theirs = torch.autograd.grad(
            (expected * probe).sum(), [z, share] if name == "said" else [z]
        )
        for a, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), e, atol=1e-5, rtol=1e-5)


def test_map_is_linear_and_its_gradient_is_its_transpose():
    H = fastfood.hadamard(fastfood.RADIX).double()
    drawn = fastfood.draw(700, 5000, torch.Generator().manual_seed(1))
    parts = drawn._replace(G=drawn.G.double())
    a, b = torch.randn(2, 700, dtype=torch.float64)
    w = torch.randn(5000, dtype=torch.float64)

    def image(z):
        return fastfood.apply(z, parts, H, 5000)

    torch.testing.assert_close(image(2 * a - 3 * b), 2 * image(a) - 3 * image(b))
    z = a.clone().requires_grad_()
    (of_z,) = torch.autograd.grad(image(z) @ w, z)
    torch.testing.assert_close(image(b) @ w, b @ of_z)


@pytest.mark.parametrize(("d", "D"), [(1000, 110_592), (1000, 900), (64, 64 * 64)])
def test_lengths_are_kept(d, D):
    H = fastfood.hadamard(fastfood.RADIX)
    generator = torch.Generator().manual_seed(2)
    ratios = []
    for _ in range(20):
        z = torch.randn(d, generator=generator)
        ratios.append(fastfood.apply(z, fastfood.draw(d, D, generator), H, D).norm() / z.norm())
    ratios = torch.stack(ratios)
    assert abs(ratios.mean() - 1) < 0.03 and ratios.std() < 0.1


def test_the_seed_is_the_projection():
    one, two = (make("did", tiny_llama(layers=1)) for _ in range(2))
    other = make("did", tiny_llama(layers=1))
    other.seed += 1
    other.loaded()
    for a, b, c in zip(one.tensors, two.tensors, other.tensors, strict=True):
        assert torch.equal(a.G, b.G) and torch.equal(a.pi, b.pi) and torch.equal(a.B, b.B)
        assert not torch.equal(a.G, c.G)
    assert not torch.equal(one.tensors[0].G, one.tensors[3].G)  # each site has its own


def test_the_file_is_z_and_a_seed(tmp_path):
    net = tiny_llama(layers=1)
    method = make("said", net)
    attach(method, net)
    shake(method)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter_tensors(net).items()}
    lambdas = {f"peft.lambda_.{s.name.replace('.', '/')}": () for s in method.sites}
    assert shapes == {"peft.z": (96,), "peft.seed": (), **lambdas}
    save_adapter(net, tmp_path / "a.safetensors", {})
    twin = tiny_llama(layers=1)
    torch.manual_seed(77)
    loaded = make("said", twin)
    loaded.seed += 1
    loaded.loaded()
    loaded.attach(twin)
    load_adapter(twin, tmp_path / "a.safetensors")
    assert torch.equal(loaded.tensors[2].G, method.tensors[2].G)


@pytest.mark.parametrize("dimension", [0, 129, 2.5])
def test_dimension_is_at_most_the_smallest_padded_site(dimension):
    net = tiny_llama(layers=1)  # k and v are [8, 16]
    make("did", net, dimension=128)
    with pytest.raises(InputError, match=r"method.dimension=.*: a whole number.*at most 128"):
        make("did", net, dimension=dimension)

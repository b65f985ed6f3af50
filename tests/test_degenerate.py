"""A tied method at the edge of its settings is a smaller one: the logits of a whole model agree.

The scales s are written out here from the cards, not read from the methods.
"""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, shake
from torch import Tensor, nn

from peftlab.method import rms

LAYERS, RANK = 3, 4
GAMMA, ALPHA = 2.0, 3.0
COMMON = {"gamma": GAMMA, "alpha": ALPHA}


def attached(name: str, net: nn.Module, **settings: object) -> tuple[nn.Module, Any]:
    net = deepcopy(net)
    method = make(name, net, **settings)
    method.attach(net)
    return net, method


def nu_of(W: Tensor) -> float:
    return math.sqrt((W.double() ** 2).mean().item())


def paired(one: Any, other: Any):
    """Yield (site, layer, tensors of one, tensors of other)."""
    layers: dict[str, int] = {}
    for site, a, b in zip(one.sites, one.tensors, other.tensors, strict=True):
        layers[site.kind] = layers.get(site.kind, -1) + 1
        yield site, layers[site.kind], a, b
    assert set(layers.values()) == {LAYERS - 1}


def same_function(one: nn.Module, other: nn.Module, base: nn.Module, tokens: Tensor) -> None:
    frozen = base(tokens).logits
    logits, expected = one(tokens).logits, other(tokens).logits
    assert (expected - frozen).abs().max() > 0.1  # away from the identity
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def loss_of(net: nn.Module, tokens: Tensor) -> Tensor:
    logits = net(tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def test_partially_tied_with_one_matrix_per_layer_is_lora(net, tokens):
    wide, partial = attached("partially_tied_lora", net, l_a=LAYERS, l_b=LAYERS, **COMMON)
    plain, lora = attached("lora", net, rank=RANK, alpha=float(RANK))  # scale 1
    shake(partial)
    for site, layer, t, own in paired(partial, lora):
        for w in (t.w_A, t.w_B):
            w.copy_(F.one_hot(torch.tensor(layer), LAYERS))
        s = GAMMA**3 * ALPHA * nu_of(site.module.weight) / math.sqrt(RANK * LAYERS * LAYERS)
        own.A.copy_(t.L_A[layer])
        own.B.copy_(s * t.L_B[layer])
    same_function(wide, plain, net, tokens)


@torch.no_grad()
def test_partially_tied_with_one_matrix_and_vectors_is_tied_lora(net, tokens):
    vectors = {"pre": False, "mid": True, "post": True}
    wide, partial = attached("partially_tied_lora", net, l_a=1, l_b=1, **vectors, **COMMON)
    plain, tied = attached("tied_lora", net, u=True, v=True, **COMMON)
    shake(partial)
    for _, _, t, own in paired(partial, tied):
        own.A.copy_(t.L_A[0])
        own.B.copy_(t.L_B[0])
        # s has gamma^5 here, gamma^3 there: a boost for each of w_A, w_B
        own.u.copy_(GAMMA**2 * t.w_A * t.w_B * t.mid)
        own.v.copy_(t.post)
    same_function(wide, plain, net, tokens)


@pytest.mark.parametrize("post", [False, True])
@torch.no_grad()
def test_tied_lora_extra_with_a_diagonal_core_is_tied_lora(post, net, tokens):
    sizes = {"r_1": RANK, "r_2": RANK, "pre": False, "post": post}
    wide, extra = attached("tied_lora_extra", net, **sizes, **COMMON)
    plain, tied = attached("tied_lora", net, u=True, v=post, **COMMON)
    shake(extra)
    for _, _, t, own in paired(extra, tied):
        t.M.copy_(t.M.diag().diag())
        own.A.copy_(t.A)
        own.B.copy_(t.B)
        own.u.copy_(t.M.diag() / math.sqrt(RANK))  # s divides by √(r_1 r_2) = r, there by √r
        if post:
            own.v.copy_(t.post)
    same_function(wide, plain, net, tokens)


@pytest.mark.parametrize(("pre", "post"), [(False, False), (True, True)])
@torch.no_grad()
def test_tensor_embedding_with_one_core_per_layer_is_tied_lora_extra(pre, post, net, tokens):
    sizes = {"r_1": 4, "r_2": 3, "pre": pre, "post": post}
    wide, embedding = attached("tensor_embedding", net, l_1=LAYERS, **sizes, **COMMON)
    plain, extra = attached("tied_lora_extra", net, **sizes, **COMMON)
    shake(embedding)
    for _, layer, t, own in paired(embedding, extra):
        t.w.copy_(F.one_hot(torch.tensor(layer), LAYERS))
        own.A.copy_(t.A)
        own.B.copy_(t.B)
        own.M.copy_(t.T[layer] * GAMMA / math.sqrt(LAYERS))
        if pre:
            own.pre.copy_(t.pre)
        if post:
            own.post.copy_(t.post)
    same_function(wide, plain, net, tokens)


@torch.no_grad()
def test_one_core_for_all_layers_is_tied_lora_extra_with_proportional_cores(net, tokens):
    sizes = {"r_1": 4, "r_2": 3, "pre": False, "post": False}
    wide, embedding = attached("tensor_embedding", net, l_1=1, **sizes, **COMMON)
    plain, extra = attached("tied_lora_extra", net, **sizes, **COMMON)
    shake(embedding)
    for _, _, t, own in paired(embedding, extra):
        own.A.copy_(t.A)
        own.B.copy_(t.B)
        own.M.copy_(GAMMA * t.w * t.T[0])
    same_function(wide, plain, net, tokens)


@torch.no_grad()
def test_simple_dora_merges_into_its_definition(net, tokens):
    beta = 30.0
    merged, method = attached("simple_dora", net, beta=beta, **COMMON)
    shake(method, std=0.02)  # m starts at 1/30
    by_hand = deepcopy(net)
    for site, t in zip(method.sites, method.tensors, strict=True):
        W = site.module.weight.double()
        n = W.square().mean(1).sqrt()
        s = GAMMA * ALPHA / math.sqrt(RANK)
        V = W / n[:, None] + s * t.B.double() @ t.A.double()
        by_hand.get_submodule(site.name).weight.copy_((beta * n * t.m)[:, None] * V)
    method.merge(merged)
    for site in method.sites:
        W = by_hand.get_submodule(site.name).weight
        torch.testing.assert_close(site.module.weight, W, atol=1e-6, rtol=1e-6)
    same_function(merged, by_hand, net, tokens)


@torch.no_grad()
def test_simple_dora_with_a_fixed_magnitude_is_lora_with_a_scale_per_output(net, tokens):
    wide, method = attached("simple_dora", net, **COMMON)  # m stays 1/beta
    plain, lora = attached("lora", net, rank=RANK, alpha=float(RANK))
    shake(method)
    for site, _, t, own in paired(method, lora):
        t.m.fill_(1.0)
        n = site.module.weight.double().square().mean(1).sqrt()
        own.A.copy_(t.A)
        own.B.copy_((GAMMA * ALPHA / math.sqrt(RANK)) * n[:, None] * t.B)
    same_function(wide, plain, net, tokens)


def test_tied_lora_with_frozen_factors_is_vera(net, tokens):
    frozen, vera = attached("vera", net, rank=RANK)
    wide, tied = attached("tied_lora", net, u=True, v=True, **COMMON)
    shake(vera, std=0.5)
    for holder in (tied.A, tied.B):
        holder.requires_grad_(False)
    scales = []
    with torch.no_grad():
        for site, _, v, t in paired(vera, tied):
            s = GAMMA**3 * ALPHA * nu_of(site.module.weight) / math.sqrt(RANK)
            t.A.copy_(vera.A[:, : site.d_in])
            t.B.copy_(vera.B[: site.d_out])
            t.u.copy_(v.d)
            t.v.copy_(v.b / s)
            scales.append(s)
    same_function(wide, frozen, net, tokens)
    for model in (wide, frozen):
        loss_of(model, tokens).backward()
    for (_, _, v, t), s in zip(paired(vera, tied), scales, strict=True):
        torch.testing.assert_close(t.u.grad, v.d.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(t.v.grad / s, v.b.grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_normed_lora_is_gamma_lora_with_alpha_times_nu(net, tokens):
    wide, normed = attached("normed_lora", net, **COMMON)
    plain, gamma = attached("gamma_lora", net, **COMMON)
    shake(normed)
    for site, _, t, own in paired(normed, gamma):
        own.A.copy_(t.A)
        own.B.copy_(nu_of(site.module.weight) * t.B)
        assert rms(site.module.weight).item() == pytest.approx(nu_of(site.module.weight))
    same_function(wide, plain, net, tokens)


@torch.no_grad()
def test_tied_lora_without_vectors_is_one_lora_in_every_layer(net, tokens):
    wide, tied = attached("tied_lora", net, u=False, v=False, **COMMON)
    plain, lora = attached("lora", net, rank=RANK, alpha=float(RANK))
    shake(tied)
    for site, _, t, own in paired(tied, lora):
        own.A.copy_(t.A)
        own.B.copy_(GAMMA * ALPHA * nu_of(site.module.weight) / math.sqrt(RANK) * t.B)
    same_function(wide, plain, net, tokens)

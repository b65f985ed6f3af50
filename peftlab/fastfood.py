"""Fastfood: a random linear map from few numbers to many, in n log n, made of three vectors.

Le, Sarlos and Smola 2013, as Li et al. 2018 (arXiv:1804.08838, section S7) use it: z [d], padded
with zeros to n = 2^⌈log2 D⌉, becomes the first D entries of H G Π H B z / (√n |G|), times √(n / D),
with H the un-normalised Walsh-Hadamard matrix, B random signs, Π a permutation, G ~ N(0, 1). The
length of z is kept on average.
"""

from typing import NamedTuple

import torch
from torch import Tensor

RADIX = 32  # of the transform: products with so small a matrix are fastest on a CPU


class Map(NamedTuple):
    """The random parts of one map from d to D numbers."""

    B: Tensor  # int8 [d], signs
    pi: Tensor  # int32 [n], from 0 to m - 1: which entry of H B z, of length m, comes here
    G: Tensor  # float32 [n], scaled


def padded(D: int) -> int:
    """n: the smallest power of two that is at least D."""
    return 1 << (D - 1).bit_length()


def draw(d: int, D: int, generator: torch.Generator) -> Map:
    """Draw a map on the CPU; d is at most n.

    As B z is zero from entry d on, H B z repeats itself every m = 2^⌈log2 d⌉ entries: m of them are
    computed, and Π is kept modulo m.
    """
    n, m = padded(D), padded(d)
    B = torch.randint(2, (d,), generator=generator, dtype=torch.int8) * 2 - 1
    pi = torch.randperm(n, generator=generator, dtype=torch.int32) % m
    G = torch.randn(n, generator=generator)
    return Map(B, pi, G / (D**0.5 * torch.linalg.vector_norm(G)))


def apply(z: Tensor, parts: Map, H: Tensor, D: int) -> Tensor:
    """Map z [d] to D numbers; H is `hadamard(RADIX)`, in the type of z."""
    d = len(z)
    h = transform(torch.nn.functional.pad(parts.B * z, (0, padded(d) - d)), H)
    return transform(parts.G * h.index_select(0, parts.pi), H)[:D]


def hadamard(n: int) -> Tensor:
    """H [n, n] of n = 2^k, un-normalised, in Sylvester's order: each leading block is one, too."""
    H = torch.ones(1, 1)
    while len(H) < n:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), H)
    return H


def transform(x: Tensor, H: Tensor) -> Tensor:
    """Return H_n x for x [n], with the gradient's own transform; H is `hadamard(RADIX)`."""
    result = _Transform.apply(x, H)
    assert isinstance(result, Tensor)
    return result


class _Transform(torch.autograd.Function):
    """H is symmetric: the gradient of H x is H times the gradient, in the same fast order."""

    @staticmethod
    def forward(ctx, x: Tensor, H: Tensor) -> Tensor:
        ctx.save_for_backward(H)
        return _fast(x, H)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (H,) = ctx.saved_tensors
        return _fast(gradients[0], H), None


def _fast(x: Tensor, H: Tensor) -> Tensor:
    """H_n = H_a ⊗ H_32 ⊗ ... ⊗ H_32: one small product along each axis."""
    inner = n = len(x)
    while inner > 1:
        size = min(inner, RADIX)
        inner //= size
        factor = H[:size, :size]
        x = x.reshape(-1, size, inner)
        x = factor @ x if inner > 1 else x.squeeze(-1) @ factor
    return x.reshape(n)

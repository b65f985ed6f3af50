"""Gained outputs against their plain form, in float64, and in bf16 against both."""

import pytest
import torch

from peftlab.gain import gained, plain_gained


def parts(dtype=torch.float64, d=7):
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(3, 11, d, generator=draw, dtype=torch.float64).to(dtype)
    gain = 0.01 * torch.randn(d, generator=draw, dtype=torch.float64)
    bias = torch.randn(d, generator=draw, dtype=torch.float64).to(dtype)
    slope = torch.randn(3, 11, d, generator=draw, dtype=torch.float64).to(dtype)
    return y, gain.to(torch.promote_types(dtype, torch.float32)), bias, slope


def pass_through(function, y, gain, bias, slope):
    y, gain = y.clone().requires_grad_(), gain.clone().requires_grad_()
    out = function(y, gain, bias)
    out.backward(slope)
    return out.detach(), y.grad, gain.grad


@pytest.mark.parametrize("with_bias", [False, True])
def test_output_and_gradients_are_those_of_the_plain_form(with_bias):
    y, gain, bias, slope = parts()
    bias = bias if with_bias else None
    found = pass_through(gained, y, gain, bias, slope)
    wanted = pass_through(plain_gained, y, gain, bias, slope)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_no_gradient_for_an_input_that_needs_none():
    y, gain, bias, slope = parts()
    gain.requires_grad_()
    gained(y, gain, bias).backward(slope)
    assert torch.allclose(gain.grad, ((y - bias) * slope).sum((0, 1)), rtol=1e-13)
    assert y.grad is None


def test_in_bf16_it_is_no_less_exact_than_the_plain_form():
    y, gain, _, slope = parts(torch.bfloat16, d=600)
    exact = pass_through(plain_gained, y.double(), gain.double(), None, slope.double())

    def error(function):
        found = pass_through(function, y, gain, None, slope)
        return [float((a.double() - b).norm()) for a, b in zip(found, exact, strict=True)]

    for ours, plain in zip(error(gained), error(plain_gained), strict=True):
        assert 0 < ours <= 1.05 * plain

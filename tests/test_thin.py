"""A thin product added in place against its plain form, in float64, and in bf16 against both."""

import pytest
import torch

from peftlab.thin import add_thin_, plain_add_thin

SIZES = {"y": (2, 5, 7), "x": (2, 5, 6), "down": (3, 6), "up": (7, 3)}


def parts(names=tuple(SIZES), dtype=torch.float64):
    """Random tensors, those in `names` to be differentiated, and a gradient of the output."""
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(size, generator=draw, dtype=dtype) for size in SIZES.values()]
    slope = torch.randn(SIZES["y"], generator=draw, dtype=dtype)
    return [t.requires_grad_(name in names) for name, t in zip(SIZES, made, strict=True)], slope


def through(function, tensors, slope):
    """The output, and the gradient of each tensor."""
    y, *rest = tensors
    out = function(y * 1, *rest)  # in place of a copy
    out.backward(slope)
    return [out.detach(), *(t.grad for t in tensors)]


@pytest.mark.parametrize("names", [("y", "x", "down", "up"), ("up",), ("x",), ("down",), ("y",)])
def test_output_and_gradients_are_those_of_the_plain_form(names):
    ours, plain = (through(f, *parts(names)) for f in (add_thin_, plain_add_thin))
    assert [d is not None for d in ours[1:]] == [name in names for name in SIZES]
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_it_is_in_place():
    (y, *rest), _ = parts(())
    assert add_thin_(y, *rest) is y


def test_a_view_is_left_alone():
    (y, *rest), _ = parts(())
    before = y.clone()
    view = y.view(10, 7).view(2, 5, 7)
    assert torch.equal(add_thin_(view, *rest), plain_add_thin(y, *rest))
    assert torch.equal(y, before)


def test_a_second_derivative_is_refused_not_wrong():
    (y, *rest), slope = parts()
    slope.requires_grad_()  # as where a loss is above
    (first,) = torch.autograd.grad(add_thin_(y * 1, *rest), rest[1], slope, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_in_bf16_it_is_no_less_exact_than_the_plain_form():
    exact = through(plain_add_thin, *parts())

    def error(function):
        tensors, slope = parts(dtype=torch.float32)
        layer = [t.detach().to(torch.bfloat16).requires_grad_() for t in tensors[:2]]
        tensors = [*layer, *tensors[2:]]
        with torch.autocast("cpu", torch.bfloat16):
            found = through(function, tensors, slope.to(torch.bfloat16))
        types = [t.dtype for t in (layer[0], *tensors)]
        assert [t.dtype for t in found] == types
        return [float((a.double() - b).norm()) for a, b in zip(found, exact, strict=True)]

    for ours, plain in zip(error(add_thin_), error(plain_add_thin), strict=True):
        assert 0 < ours <= 1.3 * plain

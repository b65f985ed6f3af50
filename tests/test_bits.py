"""Bits per token against numbers made by hand, and the chunked loss against the plain form."""

import math

import pytest
import torch
import torch.nn.functional as F

from peftlab import bits
from peftlab.bits import IGNORE, Tally, linear_nll, nll, perplexity


def test_uniform_logits_cost_log2_of_the_vocabulary():
    logits = torch.zeros(2, 3, 8)  # uniform over 8: 3 bits each
    targets = torch.tensor([[1, 2, IGNORE], [IGNORE, 7, IGNORE]])
    tally = Tally()
    tally.add(nll(logits, targets).item(), 3)
    assert tally.bits_per_token == pytest.approx(3.0, abs=1e-6)
    assert tally.nats == pytest.approx(3 * math.log(8), rel=1e-6)


def test_hand_made_probabilities():
    # p(target) = 1/2, 1/4, 1/8: 1 + 2 + 3 bits over three targets, a masked fourth costs nothing
    p = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.125, 0.5, 0.375], [0.9, 0.05, 0.05]])
    targets = torch.tensor([0, 0, 0, IGNORE])
    nats = nll(p.log(), targets).item()
    assert nats == pytest.approx(6 * math.log(2), rel=1e-6)
    assert Tally(nats, 3).bits_per_token == pytest.approx(2.0, rel=1e-6)


def test_sum_over_sum_is_not_a_mean_of_means():
    tally = Tally()
    tally.add(10 * math.log(2), 10)  # 1 bit per token
    tally.add(4 * math.log(2), 1)  # 4 bits per token
    assert tally.bits_per_token == pytest.approx(14 / 11)  # the mean of means would be 2.5
    assert tally.bits_per_byte(28) == pytest.approx(0.5)
    assert tally.bits_per_byte(0) is None


def test_perplexity():
    assert perplexity(3.0) == 8.0
    assert perplexity(5000.0) == math.inf


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("per_chunk", "at_a_time"), [(1, 5), (7, 2), (10**9, 3), (10**9, 10**9)])
def test_chunked_loss_equals_the_plain_form(monkeypatch, per_chunk, at_a_time, with_bias):
    monkeypatch.setattr(bits, "LOGITS_PER_CHUNK", per_chunk * 13)
    monkeypatch.setattr(bits, "IN_CACHE", at_a_time * 13)
    torch.manual_seed(0)
    hidden = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(13, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(13, dtype=torch.float64, requires_grad=True) if with_bias else None
    targets = torch.randint(13, (3, 6))
    targets[0, 2:] = IGNORE
    targets[2] = IGNORE  # a row without any
    inputs = [t for t in (hidden, head, bias) if t is not None]
    plain = F.cross_entropy(
        F.linear(hidden, head, bias).flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )
    expected = torch.autograd.grad(plain * 0.7, inputs)
    chunked = linear_nll(hidden, head, bias, targets)
    actual = torch.autograd.grad(chunked * 0.7, inputs)
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-6)  # logits are float32 inside
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert linear_nll(hidden, head, bias, targets).item() == pytest.approx(
            plain.item(), rel=1e-6
        )


@pytest.mark.parametrize("target, nats", [(0, 0.0), (1, 300.0), (2, 9000.0)])
def test_what_is_nearly_impossible_costs_no_more_than_it_does(target, nats):
    logits = torch.tensor([[1000.0, 700.0, -8000.0]])  # e^-300 is no float32
    hidden = torch.ones(1, 1, requires_grad=True)
    loss = linear_nll(hidden, logits.T, None, torch.tensor([target]))
    loss.backward()
    assert loss.item() == nats
    assert hidden.grad.item() == 1000.0 - logits[0, target]  # Σ (p - one-hot) logit


def test_no_target_costs_nothing():
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    nats = linear_nll(hidden, torch.randn(5, 4), None, torch.full((2, 3), IGNORE))
    nats.backward()
    assert nats.item() == 0 and not hidden.grad.any()


def test_autocast_multiplies_in_bf16_and_adds_in_float32():
    torch.manual_seed(0)
    hidden, head = torch.randn(4, 64), torch.randn(50, 64)
    targets = torch.randint(50, (4,))
    with torch.autocast("cpu", torch.bfloat16):
        nats = linear_nll(hidden, head, None, targets)
    rounded = F.linear(hidden.bfloat16(), head.bfloat16()).float()
    assert nats.dtype == torch.float32
    assert nats.item() == pytest.approx(nll(rounded, targets).item(), rel=1e-6)

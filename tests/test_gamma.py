"""The γ laws: boosting a factor is a larger learning rate for it, exactly, in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, tiny_gpt2
from torch import Tensor, nn

from peftlab.method import Method

# GPT-2 only: transformers' Llama computes norms and softmax in float32 whatever the weights are.
GAMMA, ALPHA, LR, EPS, DECAY = 750.0, 3.0, 1e-3, 1e-6, 0.05
TOLERANCE = 1e-12

# method, its settings, and which tensors start γ (or β) times smaller than at γ = 1
FAMILY = [
    ("normed_lora", {}, {"A": 7.0}),
    ("simple_dora", {"beta": 30.0}, {"A": 7.0, "m": 30.0}),
    ("svdora", {}, {"A_in": 7.0, "A_out": 7.0}),
    ("tied_lora", {"u": True, "v": True}, {"A": 7.0, "u": 7.0, "v": 7.0}),
    ("tied_lora", {"u": True, "v": False}, {"A": 7.0, "u": 7.0}),
    ("tied_lora", {"u": False, "v": False}, {"A": 7.0}),
    ("tied_lora_extra", {"pre": False, "post": False}, {"A": 7.0, "M": 7.0}),
    (
        "tied_lora_extra",
        {"pre": True, "post": True},
        {"A": 7.0, "M": 7.0, "pre": 7.0, "post": 7.0},
    ),
    ("tensor_embedding", {"pre": False, "post": False}, {"A": 7.0, "T": 7.0, "w": 7.0}),
    (
        "tensor_embedding",
        {"pre": True, "post": True},
        {"A": 7.0, "T": 7.0, "w": 7.0, "pre": 7.0, "post": 7.0},
    ),
    ("partially_tied_lora", {}, {"L_A": 7.0, "w_A": 7.0, "w_B": 7.0}),
    (
        "partially_tied_lora",
        {"pre": True, "mid": True, "post": True},
        {"L_A": 7.0, "w_A": 7.0, "w_B": 7.0, "pre": 7.0, "mid": 7.0, "post": 7.0},
    ),
]


def doubled(name: str, **settings: object) -> tuple[nn.Module, Any]:
    """A tiny GPT-2 with the method attached, all of it float64."""
    net = tiny_gpt2(layers=2)
    method: Any = make(name, net, **settings)
    method.attach(net)
    net.double()
    for t in method.tensors:
        for key, tensor in vars(t).items():
            if not isinstance(tensor, nn.Parameter):  # .double() replaces buffers by others
                setattr(t, key, tensor.double())
    for tensor in (p for t in method.tensors for p in vars(t).values() if p.requires_grad):
        assert tensor.dtype == torch.float64
        assert any(tensor is p for p in method.parameters())
    return net, method


def of(method: Method, name: str) -> list[nn.Parameter]:
    return list(getattr(method, name).parameters())


def names_of(method: Method) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name, _ in method.named_parameters()))


@torch.no_grad()
def copy_unboosted(boosted: Method, plain: Method, factors: dict[str, float]) -> None:
    for name in names_of(plain):
        for small, large in zip(of(boosted, name), of(plain, name), strict=True):
            large.copy_(small * factors.get(name, 1.0))


def train(net: Any, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    """Train on fixed batches; return the logits before, midway and after."""
    generator = torch.Generator().manual_seed(8)
    batches = torch.randint(net.config.vocab_size, (steps, 3, 7), generator=generator)
    seen = []
    for step, tokens in enumerate(batches):
        if step in (0, steps // 2):
            seen.append(net(batches[0]).logits.detach())
        logits = net(tokens, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seen.append(net(batches[0]).logits.detach())
    assert (seen[-1] - seen[0]).abs().max() > 1e-3  # it did go somewhere
    return torch.stack(seen)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def check_equal(
    boosted: tuple[nn.Module, Method],
    plain: tuple[nn.Module, Method],
    factors: dict[str, float],
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    steps: int,
) -> None:
    logits = [
        train(net, optimizer, steps)
        for (net, _), optimizer in zip((boosted, plain), optimizers, strict=True)
    ]
    assert relative(logits[0], logits[1]) < TOLERANCE
    for name in names_of(plain[1]):
        for small, large in zip(of(boosted[1], name), of(plain[1], name), strict=True):
            assert relative(small * factors.get(name, 1.0), large) < TOLERANCE, name


def adamw_groups(method: Method, factors: dict[str, float]) -> list[dict]:
    """The group of a tensor that starts g times larger has lr·g, ε/g and weight decay/g."""
    return [
        {
            "params": of(method, name),
            "lr": LR * factors.get(name, 1.0),
            "eps": EPS / factors.get(name, 1.0),
            "weight_decay": DECAY / factors.get(name, 1.0),
        }
        for name in names_of(method)
    ]


@pytest.mark.parametrize("random_factor", ["A", "B"])
def test_gamma_is_adamws_learning_rate_of_the_random_factor(random_factor):
    settings = {"alpha": ALPHA, "random_factor": random_factor}
    boosted = doubled("gamma_lora", gamma=GAMMA, **settings)
    plain = doubled("gamma_lora", gamma=1.0, **settings)
    factors = {random_factor: GAMMA}
    copy_unboosted(boosted[1], plain[1], factors)
    optimizers = (
        torch.optim.AdamW(boosted[1].parameters(), lr=LR, eps=EPS, weight_decay=DECAY),
        torch.optim.AdamW(adamw_groups(plain[1], factors)),
    )
    check_equal(boosted, plain, factors, optimizers, steps=50)


@pytest.mark.parametrize("random_factor", ["A", "B"])
def test_gamma_squared_is_sgds_learning_rate_of_the_random_factor(random_factor):
    gamma = 15.0  # at 750 no learning rate suits both factors
    settings = {"alpha": ALPHA, "random_factor": random_factor}
    boosted = doubled("gamma_lora", gamma=gamma, **settings)
    plain = doubled("gamma_lora", gamma=1.0, **settings)
    factors = {random_factor: gamma}
    copy_unboosted(boosted[1], plain[1], factors)
    groups = [
        {"params": of(plain[1], name), "lr": LR * factors.get(name, 1.0) ** 2} for name in "AB"
    ]
    optimizers = (torch.optim.SGD(boosted[1].parameters(), lr=LR), torch.optim.SGD(groups))
    check_equal(boosted, plain, factors, optimizers, steps=50)


@pytest.mark.parametrize(("name", "settings", "factors"), FAMILY)
def test_every_boost_counts_the_factors_that_are_there(name, settings, factors):
    boosted = doubled(name, gamma=7.0, **settings)
    plain = doubled(name, gamma=1.0, **settings | ({"beta": 1.0} if "beta" in settings else {}))
    copy_unboosted(boosted[1], plain[1], factors)
    optimizers = (
        torch.optim.AdamW(boosted[1].parameters(), lr=LR, eps=EPS, weight_decay=DECAY),
        torch.optim.AdamW(adamw_groups(plain[1], factors)),
    )
    check_equal(boosted, plain, factors, optimizers, steps=10)


def test_gamma_1_is_rslora_with_a_normal_factor():
    one = doubled("gamma_lora", gamma=1.0, alpha=ALPHA)
    other = doubled("rslora", alpha=ALPHA)
    copy_unboosted(one[1], other[1], {})
    optimizers = [torch.optim.AdamW(m.parameters(), lr=LR) for _, m in (one, other)]
    check_equal(one, other, {}, (optimizers[0], optimizers[1]), steps=10)


@pytest.mark.parametrize(("random_factor", "zero"), [("A", "B"), ("B", "A")])
def test_the_random_factor_is_drawn_gamma_times_smaller(random_factor, zero):
    method = make("gamma_lora", tiny_gpt2(), gamma=GAMMA, random_factor=random_factor)
    drawn = torch.cat([p.detach().flatten() for p in of(method, random_factor)])
    error = 4 / math.sqrt(2 * len(drawn))  # four standard errors of a standard deviation
    assert drawn.std().item() * GAMMA == pytest.approx(1, abs=error)
    assert all(not p.any() for p in of(method, zero))


def test_the_change_of_the_weights_does_not_depend_on_gamma():
    boosted = doubled("gamma_lora", gamma=GAMMA, alpha=ALPHA)[1]
    plain = doubled("gamma_lora", gamma=1.0, alpha=ALPHA)[1]
    for p in boosted.parameters():
        nn.init.normal_(p)
    copy_unboosted(boosted, plain, {"A": GAMMA})
    for site, small, large in zip(plain.sites, boosted.tensors, plain.tensors, strict=True):
        W = site.module.weight.double()
        expected = W + ALPHA / 2 * large.B @ large.A  # √rank = 2
        assert relative(boosted.weight(small, W), expected) < TOLERANCE
        assert relative(plain.weight(large, W), expected) < TOLERANCE

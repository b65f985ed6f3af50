"""The schedule by hand, and LoRA+'s groups."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, tiny_llama

from peftlab.errors import InputError
from peftlab.method import trainable
from peftlab.optim import lora_plus, schedule
from peftlab.parts import build_optimizer


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", 0.0, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
        ("constant", 0.5, [1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", 0.5, [1 / 3, 2 / 3, 1, 0.5, 0]),
        ("cosine", 0.5, [1 / 3, 2 / 3, 1, 0.5, 0]),
        ("cosine", 0.25, [0.5, 1, 0.75, 0.25, 0]),
    ],
)
def test_schedule_of_four_steps(name, warmup, expected):
    factor = schedule(name, warmup=warmup, steps=4)
    assert [factor(step) for step in range(5)] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("steps", [1, 7, 1000])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedule_is_0_after_the_last_step_and_not_before(name, steps):
    factor = schedule(name, warmup=0.1, steps=steps)
    assert factor(steps) == 0
    factors = [factor(step) for step in range(steps)]
    assert min(factors) > 0
    rising = round(0.1 * steps)
    assert factors[rising] == max(factors) == 1
    assert factors[:rising] == sorted(factors[:rising])
    assert factors[rising:] == sorted(factors[rising:], reverse=True)


def attached(name, **settings) -> tuple[Any, Any]:
    net = tiny_llama()
    method = make(name, net, **settings)
    method.attach(net)
    return net, method


def step(net, optimizer, tokens, n_steps=1):
    for _ in range(n_steps):
        logits = net(tokens, use_cache=False).logits[:, :-1]
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "settings", "fast"),
    [
        ("lora", {}, {"B"}),
        ("gamma_lora", {"random_factor": "B"}, {"A"}),
        ("dora", {}, {"B", "m"}),
        ("tied_lora", {}, {"B", "u", "v"}),
        ("tensor_embedding", {}, {"B", "w"}),
        ("svdora", {}, {"B_in", "B_out", "sigma"}),
    ],
)
def test_every_tensor_is_in_one_group(name, settings, fast):
    _, method = attached(name, **settings)
    optimizer = lora_plus(list(method.parameters()), lr=1e-3, ratio=16.0)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(method.parameters()))
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for tensor_name, p in method.named_parameters():
        expected = 1.6e-2 if tensor_name.split(".")[0] in fast else 1e-3
        assert rate[id(p)] == pytest.approx(expected), tensor_name


def test_ratio_1_is_adamw(tokens):
    nets = []
    for plus in (True, False):
        net, method = attached("lora")
        params = list(method.parameters())
        settings = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6, "betas": (0.8, 0.9)}
        optimizer = (
            lora_plus(params, ratio=1.0, **settings)
            if plus
            else torch.optim.AdamW(params, **settings)
        )
        step(net, optimizer, tokens, n_steps=5)
        nets.append(dict(trainable(net)))
    start = dict(trainable(attached("lora")[0]))
    for name, p in nets[0].items():
        assert torch.equal(p, nets[1][name]) and not torch.equal(p, start[name]), name


def test_one_step_moves_the_zero_factor_ratio_times_further(tokens):
    moved = {}
    for ratio in (1.0, 16.0):
        net, method = attached("lora")
        net.double()  # the difference of two roundings is then far below a step
        optimizer = lora_plus(list(method.parameters()), lr=1e-4, ratio=ratio, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # at B = 0 there is no gradient of A
            for p in method.B.parameters():
                p.copy_(torch.randn(p.shape, generator=generator).double())
        before = {name: p.detach().clone() for name, p in trainable(net)}
        step(net, optimizer, tokens)
        moved[ratio] = {name: p.detach() - before[name] for name, p in trainable(net)}
    for name, change in moved[1.0].items():
        factor = 16 if name.startswith("peft.B") else 1
        assert change.abs().max() > 5e-5, name
        torch.testing.assert_close(moved[16.0][name], factor * change, atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", ["vera", "pissa"])
def test_a_method_without_a_pair_is_refused(name):
    _, method = attached(name)
    with pytest.raises(InputError, match="^optimizer=loraplus: .*use optimizer=adamw$"):
        lora_plus(list(method.parameters()), lr=1e-3, ratio=16.0)


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan])
def test_ratio_has_to_be_above_0(ratio):
    _, method = attached("lora")
    with pytest.raises(InputError, match=rf"^optimizer\.ratio={ratio}: .*above 0"):
        lora_plus(list(method.parameters()), lr=1e-3, ratio=ratio)


def test_the_yaml_builds_it_over_all_that_trains():
    net, method = attached("lora")
    config = {
        "_target_": "peftlab.optim.lora_plus",
        "lr": 1e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-7,
        "weight_decay": 0.01,
        "fused": True,
        "ratio": 4.0,
        "schedule": "cosine",
        "warmup": 0.0,
        "clip": None,
    }
    optimizer = build_optimizer(config, [p for _, p in trainable(net)])
    slow, fast = optimizer.param_groups
    assert {id(p) for p in slow["params"]} == {id(p) for p in method.A.parameters()}
    assert {id(p) for p in fast["params"]} == {id(p) for p in method.B.parameters()}
    assert (slow["lr"], fast["lr"]) == (1e-3, 4e-3)
    for group in (slow, fast):
        assert tuple(group["betas"]) == (0.9, 0.95) and group["eps"] == 1e-7
        assert group["weight_decay"] == 0.01 and group["fused"] is True


def test_lora_plus_refuses_full_fine_tuning_and_an_infinite_ratio():
    vectors = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 3))]
    with pytest.raises(InputError, match="optimizer=loraplus"):
        lora_plus(vectors, lr=1e-3, ratio=16.0)
    with pytest.raises(InputError, match="optimizer.ratio=inf"):
        lora_plus(vectors, lr=1e-3, ratio=float("inf"))

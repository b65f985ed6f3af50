"""Hugging Face peft as the oracle: the same factors give its outputs, gradients and training."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import NETS, make, shake
from peft import LoraConfig, VeraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from peftlab.optim import lora_plus
from peftlab.sites import FAMILIES

# peft 0.21 asks transformers 5.23 by a name that is going away
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

ALPHA = 6
OURS = {  # our method and its settings, rank 4 as in conftest
    "lora": ("lora", {"alpha": ALPHA}),
    "rslora": ("rslora", {"alpha": ALPHA}),
    "dora": ("dora", {"alpha": ALPHA}),
    "vera": ("vera", {}),
    "pissa": ("pissa", {"alpha": ALPHA}),
}
THEIRS: dict[str, dict[str, Any]] = {  # peft's settings for the same
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
TOLERANCE = 1e-5


class Twin(NamedTuple):
    """One trained tensor here and there; theirs = sign * ours (only a decomposition has signs)."""

    name: str
    ours: nn.Parameter
    theirs: nn.Parameter
    sign: Tensor


def unmodified(net: Any) -> nn.Module:
    """The same function in the classes that transformers builds: GPT-2 with its Conv1D again."""
    if net.config.model_type != "gpt2":
        return deepcopy(net)
    plain = GPT2LMHeadModel(net.config).eval()
    weights = net.state_dict()
    for name, module in plain.named_modules():
        if isinstance(module, Conv1D):
            weights[f"{name}.weight"] = weights[f"{name}.weight"].T
    plain.load_state_dict(weights)
    return plain


def hf_peft(case: str, net: Any, dropout: float) -> Any:
    """peft's own adapter on an unmodified copy of the backbone."""
    family = net.config.model_type
    common: dict[str, Any] = {
        "r": 4,
        "target_modules": list(FAMILIES[family].values()),
        "fan_in_fan_out": family == "gpt2",
    }
    if case == "vera":
        config = VeraConfig(**common, vera_dropout=dropout, d_initial=0.1)
    else:
        config = LoraConfig(**common, lora_alpha=ALPHA, lora_dropout=dropout, **THEIRS[case])
    torch.manual_seed(5)
    return get_peft_model(unmodified(net), config).eval()


def twins_of(method: Any, theirs: Any) -> list[Twin]:
    found = []
    for site, t in zip(method.sites, method.tensors, strict=True):
        layer = theirs.base_model.model.get_submodule(site.name)
        if hasattr(t, "d"):
            pairs = {"d": layer.vera_lambda_d["default"], "b": layer.vera_lambda_b["default"]}
        else:
            pairs = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
        if hasattr(t, "m"):
            pairs["m"] = layer.lora_magnitude_vector["default"].weight
        for name, p in pairs.items():
            sign = torch.ones(())
            if hasattr(t, "A0") and name == "A":
                sign = (t.A * p).sum(1, keepdim=True).sign()
            elif hasattr(t, "A0") and name == "B":
                sign = (t.B * p).sum(0, keepdim=True).sign()
            found.append(Twin(f"{site.name}.{name}", getattr(t, name), p, sign.detach()))
    assert len({id(twin.ours) for twin in found}) == len(list(method.parameters())) == len(found)
    trained = {id(p) for p in theirs.parameters() if p.requires_grad}
    assert trained == {id(twin.theirs) for twin in found}
    return found


@torch.no_grad()
def agree(twins: list[Twin]) -> None:
    """Copy our factors into peft's."""
    for twin in twins:
        twin.theirs.copy_(twin.sign * twin.ours)


def pair(case: str, net: nn.Module, dropout: float = 0.0) -> tuple[Any, Any, list[Twin]]:
    """Our method, attached to `net`, and peft's at their own starts; random factors are common."""
    theirs = hf_peft(case, net, dropout)
    name, settings = OURS[case]
    method = make(name, net, dropout=dropout, **settings)
    method.attach(net)
    if case == "vera":
        method.get_buffer("A").copy_(theirs.base_model.vera_A["default"])
        method.get_buffer("B").copy_(theirs.base_model.vera_B["default"])
    twins = twins_of(method, theirs)
    for twin in twins:
        if case == "pissa" or not twin.name.endswith("A"):  # all that is not drawn at random
            close(twin.theirs, twin.sign * twin.ours)
    if case != "pissa":
        agree(twins)
    return method, theirs, twins


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def loss_of(net: nn.Module, tokens: Tensor) -> Tensor:
    logits = net(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, steps: int
) -> Iterator[float]:
    for _ in range(steps):
        loss = loss_of(net, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


@pytest.fixture(params=OURS)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def test_outputs_and_gradients_are_pefts(case, net, tokens):
    base = net(tokens).logits
    method, theirs, twins = pair(case, net)
    shake(method)
    agree(twins)
    logits = net(tokens).logits
    assert (logits - base).abs().max() > 1e-2
    close(theirs(input_ids=tokens).logits, logits)
    loss_of(net, tokens).backward()
    loss_of(theirs, tokens).backward()
    for twin in twins:
        theirs_grad, ours_grad = twin.theirs.grad, twin.ours.grad
        assert theirs_grad is not None and ours_grad is not None, twin.name
        assert ours_grad.abs().max() > 1e-5, twin.name
        close(theirs_grad, twin.sign * ours_grad)


def test_twenty_adamw_steps_are_pefts(case, net, tokens):
    _, theirs, twins = pair(case, net)
    before = [twin.ours.detach().clone() for twin in twins]
    # PiSSA's two ways to hold W - s B0 A0 round differently, so it walks at its own smaller lr
    lr = 2e-4 if case == "pissa" else 1e-3
    losses = []
    for model, params in ((net, [t.ours for t in twins]), (theirs, [t.theirs for t in twins])):
        optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.1)
        losses.append(list(train(model, optimizer, tokens, 20)))
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)
    assert losses[0][-1] < losses[0][0] - 1e-3
    close(theirs(input_ids=tokens).logits, net(tokens).logits)
    for twin, start in zip(twins, before, strict=True):
        assert (twin.ours - start).abs().max() > 1e-3, twin.name
        close(twin.theirs, twin.sign * twin.ours)


@pytest.mark.parametrize("case", ["lora", "dora", "vera"])
def test_dropout_falls_where_pefts_does(case, tokens):
    net = NETS["llama"]()
    method, theirs, twins = pair(case, net, dropout=0.4)
    shake(method)
    agree(twins)
    plain = net(tokens).logits
    logits = []
    for model in (net, theirs):
        model.train()  # the backbones have no dropout of their own
        torch.manual_seed(6)
        logits.append(model(input_ids=tokens).logits)
    assert (logits[0] - plain).abs().max() > 1e-2
    close(logits[1], logits[0])


@pytest.mark.parametrize(("case", "kind"), [("lora", "gpt2"), ("dora", "llama")])
def test_lora_plus_has_pefts_groups_and_steps(case, kind, tokens):
    net = NETS[kind]()
    method, theirs, twins = pair(case, net)
    lr, ratio, decay = 1e-3, 16.0, 0.1
    ours = lora_plus(list(method.parameters()), lr=lr, ratio=ratio, weight_decay=decay)
    oracle = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay
    )

    def settings(optimizer, tensors):
        names = {id(p): twin.name for p, twin in zip(tensors, twins, strict=True)}
        return {
            names[id(p)]: (group["lr"], group["weight_decay"], group["eps"], group["betas"])
            for group in optimizer.param_groups
            for p in group["params"]
        }

    expected = settings(oracle, [twin.theirs for twin in twins])
    assert settings(ours, [twin.ours for twin in twins]) == expected
    assert {facts[0] for facts in expected.values()} == {lr, lr * ratio}
    losses = [list(train(net, ours, tokens, 20)), list(train(theirs, oracle, tokens, 20))]
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)
    for twin in twins:
        close(twin.theirs, twin.sign * twin.ours)

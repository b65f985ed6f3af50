from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make, shake, tiny_gpt2, tiny_llama
from peft import AdaLoraConfig, get_peft_model
from test_peft_agreement import unmodified

from peftlab.checkpoint import load_state, save_state
from peftlab.errors import InputError
from peftlab.fit import Progress
from peftlab.sites import FAMILIES

# peft 0.21 asks transformers 5.23 by a name that is going away
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

SETTINGS = {"alpha": 6.0, "warmup": 0.1, "cooldown": 0.2}  # of 20 steps: t_i = 2, t_f = 4


def hf_peft(net: Any, *, every: int = 1, total: int = 20) -> Any:
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=6,
        tinit=total // 10,
        tfinal=total // 5,
        deltaT=every,
        total_step=total,
        target_modules=list(FAMILIES[net.config.model_type].values()),
        fan_in_fan_out=net.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(unmodified(net), config).eval()


def twins_of(method, theirs):
    """Pairs of our and their tensors, in the same order; theirs hold ours."""
    found = []
    for site, t in zip(method.sites, method.tensors, strict=True):
        layer = theirs.base_model.model.get_submodule(site.name)
        found += [
            (t.P, layer.lora_B["default"]),
            (t.Lambda, layer.lora_E["default"]),
            (t.Q, layer.lora_A["default"]),
        ]
    with torch.no_grad():
        for ours, other in found:
            other.copy_(ours.view_as(other))
    return found


def loss_of(net, tokens):
    logits = net(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(net, method, optimizer, tokens, steps, total=20):
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, tokens).backward()
        method.penalty().backward()
        optimizer.step()
        method.after_step(step, total)


def lambdas(method):
    return torch.cat([t.Lambda.detach() for t in method.tensors])


def test_outputs_penalty_and_gradients_are_pefts(net, tokens):
    base = net(tokens).logits
    method = make("adalora", net, **SETTINGS)
    method.attach(net)
    shake(method, 0.3)
    theirs = hf_peft(bare(net))
    twins = twins_of(method, theirs)
    logits = net(tokens).logits
    assert (logits - base).abs().max() > 0.1
    torch.testing.assert_close(theirs(input_ids=tokens).logits, logits, atol=1e-4, rtol=1e-4)
    penalty = method.penalty()
    their_loss = theirs(input_ids=tokens, labels=tokens).loss
    plain = loss_of(theirs, tokens)
    assert penalty.item() > 0.1
    assert (their_loss - plain).item() == pytest.approx(penalty.item(), rel=1e-5)
    (loss_of(net, tokens) + penalty).backward()
    their_loss.backward()
    for ours, other in twins:
        assert ours.grad.abs().max() > 1e-5
        torch.testing.assert_close(other.grad.view_as(ours), ours.grad, atol=1e-5, rtol=1e-4)


def bare(net):
    """The backbone without the method, which peft needs unwrapped."""
    return {"llama": tiny_llama, "gpt2": tiny_gpt2}[net.config.model_type]()


@pytest.mark.parametrize("every", [1, 3])
def test_twenty_steps_choose_as_peft_does(net, every, tokens):
    """In float64 and with peft's 1e-5 beside the rank taken away, for scores lie close."""
    theirs: Any = hf_peft(net, every=every).double()
    method = make("adalora", net, every=every, **SETTINGS)
    method.attach(net)
    net.double()
    twins = twins_of(method, theirs)
    for name, p in theirs.named_parameters():
        if "ranknum" in name:
            p.data.fill_(4 - 1e-5)
    ours = torch.optim.AdamW([mine for mine, _ in twins], lr=1e-2)
    other = torch.optim.AdamW([p for _, p in twins], lr=1e-2)
    seen = []
    for step in range(1, 21):
        train(net, method, ours, tokens, [step])
        other.zero_grad()
        theirs(input_ids=tokens, labels=tokens).loss.backward()
        other.step()
        theirs.base_model.update_and_allocate(step)
        for mine, p in twins:
            # the backbone's norms and softmax compute in float32
            torch.testing.assert_close(
                p.detach().view_as(mine), mine.detach(), rtol=1e-4, atol=1e-5
            )
        seen.append(int(lambdas(method).count_nonzero()))
    n = len(method.sites)
    assert seen[:2] == [4 * n] * 2 and seen[16:] == [2 * n] * 4
    if every == 1:
        budget = theirs.base_model.rankallocator.budget_schedule
        assert seen == [budget(step)[0] for step in range(1, 21)]


@pytest.mark.parametrize("total", [20, 100, 370])
def test_budget_is_pefts(total):
    net = tiny_llama(1)
    method = make("adalora", net, **SETTINGS)
    allocator = hf_peft(net, total=total).base_model.rankallocator
    budgets = [method.budget(step, total) for step in range(total + 1)]
    assert budgets == [allocator.budget_schedule(step)[0] for step in range(total + 1)]
    assert budgets[0] == budgets[total // 10] == 28 and budgets[-1] == 14  # 7 sites
    assert 14 == budgets[total - total // 5] < budgets[total // 2] < 28


def test_budget_by_hand():
    method = make("adalora", tiny_llama(1), rank=4, target_rank=1, warmup=0.2, cooldown=0.2)
    # of ten steps: 28 until 2, 7 from 8 on, half way at 5: 7 + 21 / 8
    assert [method.budget(step, 10) for step in (0, 2, 5, 8, 10)] == [28, 28, 9, 7, 7]
    assert [method.budget(step, 1) for step in (0, 1)] == [28, 7]


def test_penalty_by_hand():
    method = make("adalora", tiny_gpt2(), orthogonality=0.5)
    with torch.no_grad():
        for t in method.tensors:
            t.P.copy_(orthonormal(*t.P.shape))
            t.Q.copy_(orthonormal(*t.Q.shape))
    assert method.penalty().item() == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        for t in method.tensors:
            t.Q.mul_(2)  # Q Qᵀ - 1 = 3, of norm 3 √4; half of all matrices
    assert method.penalty().item() == pytest.approx(0.5 * 6 / 2, rel=1e-5)
    assert make("adalora", tiny_gpt2(), orthogonality=0).penalty() is None


def orthonormal(*shape):
    return torch.nn.init.orthogonal_(torch.empty(shape))


def test_it_is_a_lora_with_lambda_absorbed(net, tokens, expect_close):
    other = deepcopy(net)
    adalora, lora = make("adalora", net, alpha=6.0), make("lora", other, alpha=6.0)
    adalora.attach(net)
    lora.attach(other)
    shake(adalora, 0.3)
    with torch.no_grad():
        for t, own in zip(adalora.tensors, lora.tensors, strict=True):
            own.A.copy_(torch.diag(t.Lambda) @ t.Q)
            own.B.copy_(t.P)
    expect_close(net(tokens).logits, other(tokens).logits)


def test_a_run_that_was_stopped_goes_on_exactly(tokens, tmp_path):
    results = []
    for cut in (None, 7, 18):
        net = tiny_llama()
        method = make("adalora", net, every=4, **SETTINGS)
        method.attach(net)
        optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
        train(net, method, optimizer, tokens, range(1, (cut or 20) + 1))
        if cut:
            save_state(tmp_path / "c" / "state", net, optimizer, Progress())
            net = tiny_llama()
            method = make("adalora", net, every=4, **SETTINGS)
            method.attach(net)
            optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
            load_state(tmp_path / "c" / "state", net, optimizer)
            train(net, method, optimizer, tokens, range(cut + 1, 21))
        results.append(method.state_dict())
    for resumed in results[1:]:
        assert all(torch.equal(resumed[k], results[0][k]) for k in results[0])
    assert any(t.any() for k, t in results[0].items() if k.startswith("Q_spread"))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rank": 17}, "method.rank=17: a whole number from 1 to 8 (the smaller side of "),
        ({"target_rank": 5}, "method.target_rank=5: a whole number of at least 1 and at most 4"),
        ({"every": 0}, "method.every=0: a whole number of at least 1"),
        ({"alpha": 0}, "method.alpha=0: a finite number above 0"),
        ({"warmup": 1.0}, "method.warmup=1.0: a share of all steps, in [0, 1)"),
        (
            {"warmup": 0.5, "cooldown": 0.5},
            "method.cooldown=0.5: a share of all steps, in [0, 1 - warmup)",
        ),
        ({"beta_1": 1.0}, "method.beta_1=1.0: a number between 0 and 1, neither of them"),
        ({"beta_2": True}, "method.beta_2=True: a number between 0 and 1, neither of them"),
        ({"orthogonality": -1}, "method.orthogonality=-1: a finite number of at least 0"),
    ],
)
def test_bad_input(changes, line):
    with pytest.raises(InputError) as caught:
        make("adalora", tiny_llama(), **changes)
    assert str(caught.value).startswith(line)

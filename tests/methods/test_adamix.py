"""Both mixtures of AdaMix: over adapters and over LoRA."""

import signal
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from conftest import NETS, VOCABULARY, make, shake, tiny_llama
from safetensors.torch import load_file
from torch.distributions import Categorical, kl_divergence

from peftlab.bits import IGNORE
from peftlab.data import Batch
from peftlab.errors import InputError
from peftlab.fit import logits_of, nats_of
from peftlab.methods.mixture import disagreement
from peftlab.run import Halted, run

BOTH = ("adamix", "adamix_lora")
POOLS = {"adamix": (("D", "b_D"), ("U", "b_U")), "adamix_lora": (("A",), ("B",))}
PLAIN = {  # the method of one expert, with the same numbers
    "adamix": ("houlsby", {"sites": ["down"], "activation": "gelu", "std": 0.02}),
    "adamix_lora": ("lora", {}),
}


def attached(name, net, **changes):
    method = make(name, net, **changes)
    method.attach(net)
    return method


def batch_of(ids):
    targets = ids[:, 1:].clone()
    targets[0, :2] = IGNORE
    return Batch(ids[:, :-1], targets, None, targets.numel())


def passes(net):
    """The two forms of a forward pass that a method's objective is given."""
    return lambda batch: nats_of(net, batch), lambda batch: logits_of(net, batch)


def with_experts(name, net, method, experts):
    """The plain method on a copy of the bare net, each site with the tensors of `experts`."""
    plain_name, settings = PLAIN[name]
    plain = attached(plain_name, net, **settings)
    assert [s.name for s in plain.sites] == [s.name for s in method.sites]
    with torch.no_grad():
        for t, chosen in zip(plain.tensors, experts, strict=True):
            for key, tensor in vars(chosen).items():
                getattr(t, key).copy_(tensor)
    return plain


def average(t, name):
    keys = [key for pool in POOLS[name] for key in pool]
    return SimpleNamespace(**{key: sum(getattr(t, key)) / len(getattr(t, key)) for key in keys})


def draws(name, method):
    """Draw as a pass does: per site in order, per pool."""
    picks = []
    for t in method.tensors:
        pick = {}
        for pool in POOLS[name]:
            i = torch.randint(len(getattr(t, pool[0])), ()).item()
            pick |= dict.fromkeys(pool, i)
        picks.append(pick)
    return picks


def experts_of(method, picks):
    return [
        SimpleNamespace(**{key: getattr(t, key)[i] for key, i in pick.items()})
        for t, pick in zip(method.tensors, picks, strict=True)
    ]


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("name", BOTH)
def test_one_expert_is_the_plain_method_and_agrees_with_itself(name, kind, tokens, expect_close):
    net = NETS[kind]()
    bare = deepcopy(net)
    method = attached(name, net, experts_down=1, experts_up=1)
    one = average(method.tensors[0], name)
    plain_name, settings = PLAIN[name]
    for key, tensor in vars(one).items():  # the start is the plain method's too
        assert torch.equal(tensor, getattr(make(plain_name, bare, **settings).tensors[0], key))
    shake(method)
    plain = with_experts(name, bare, method, [average(t, name) for t in method.tensors])
    batch = batch_of(tokens)
    for mode in (True, False):
        net.train(mode)
        assert torch.equal(net(tokens).logits, bare(tokens).logits)
    net.train()
    objective, nats = method.objective(*passes(net), batch)
    assert objective.item() == nats.item()
    expect_close(nats, nats_of(bare, batch))
    objective.backward()
    nats_of(bare, batch).backward()
    for t, p in zip(method.tensors, plain.tensors, strict=True):
        for key in vars(one):
            expect_close(getattr(t, key).grad[0], getattr(p, key).grad)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("name", BOTH)
def test_training_draws_experts_and_evaluation_takes_their_average(
    name, kind, tokens, expect_close
):
    net = NETS[kind]()
    bare = deepcopy(net)
    method = attached(name, net, experts_down=3, experts_up=2)
    net.train()
    at_start = [net(tokens).logits for _ in range(3)]
    assert torch.equal(at_start[0], at_start[1])  # equal experts: a draw changes nothing
    shake(method)
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        picks = draws(name, method)
        torch.manual_seed(seed)
        logits = net(tokens).logits
        routed = deepcopy(bare)
        with_experts(name, routed, method, experts_of(method, picks))
        expect_close(logits, routed(tokens).logits)
        seen.add(logits.sum().item())
    assert len(seen) == 6
    net.eval()
    merged = deepcopy(bare)
    with_experts(name, merged, method, [average(t, name) for t in method.tensors])
    expect_close(net(tokens).logits, merged(tokens).logits)


@pytest.mark.parametrize("name", BOTH)
def test_every_expert_is_drawn_as_often_and_the_pools_apart(name):
    method = make(name, tiny_llama(), experts_down=3, experts_up=2).train()
    (t, *_), (down, up) = method.tensors, (pool[0] for pool in POOLS[name])
    with torch.no_grad():
        for key, count in ((down, 3), (up, 2)):
            tensor = getattr(t, key)
            tensor.copy_(torch.arange(count).reshape(-1, 1, 1).expand_as(tensor))
    counts = torch.zeros(3, 2)
    for _ in range(600):
        one = method.routed(t)
        counts[int(getattr(one, down)[0, 0]), int(getattr(one, up)[0, 0])] += 1
    assert ((counts - 100).abs() < 40).all()  # four standard deviations


@pytest.mark.parametrize("name", BOTH)
def test_identical_experts_are_one(name, net, tokens, expect_close):
    method = attached(name, net, experts_down=4, experts_up=3)
    shake(method)
    with torch.no_grad():
        for p in method.parameters():
            p.copy_(p[:1].expand_as(p))
    net.train()
    routed = net(tokens).logits
    net.eval()
    expect_close(net(tokens).logits, routed)
    if method.mergeable:
        net.train()
        method.merge(net)
        expect_close(net(tokens).logits, routed)


@pytest.mark.parametrize("name", BOTH)
def test_compact_leaves_one_expert_and_the_function(name, net, tokens):
    bare = deepcopy(net)
    method = attached(name, net, experts_down=4, experts_up=2)
    plain_name, settings = PLAIN[name]
    single = sum(p.numel() for p in make(plain_name, bare, **settings).parameters())
    shake(method)
    logits = net(tokens).logits
    before = sum(p.numel() for p in method.parameters())
    assert before > 2 * single
    for _ in range(2):
        method.compact()
        assert sum(p.numel() for p in method.parameters()) == single
        assert torch.equal(net(tokens).logits, logits)
    net.train()
    assert torch.equal(net(tokens).logits, logits)  # nothing is left to draw from


def test_merging_in_training_mode_merges_the_average(net, tokens, expect_close):
    method = attached("adamix_lora", net, experts_up=3)
    shake(method)
    expected = net(tokens).logits
    net.train()
    method.merge(net)
    expect_close(net(tokens).logits, expected)


def test_disagreement_is_the_symmetric_divergence(expect_close):
    torch.manual_seed(5)
    first, second = torch.randn(20, VOCABULARY) * 3, torch.randn(20, VOCABULARY) * 3
    p, q = Categorical(logits=first), Categorical(logits=second)
    expected = (kl_divergence(p, q) + kl_divergence(q, p)).sum() / 2
    expect_close(disagreement(first, second), expected)
    assert disagreement(first, second) == disagreement(second, first) > 0
    assert disagreement(first, first) == 0
    shifted = disagreement(first, first + 7.0)  # the same distribution
    assert 0 <= shifted < 1e-4
    # by hand: p = (1/2, 1/2), q = (1/4, 3/4)
    by_hand = (
        (0.5 - 0.25) * torch.tensor(2.0).log() + (0.5 - 0.75) * torch.tensor(2 / 3).log()
    ) / 2
    found = disagreement(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]).log())
    expect_close(found, by_hand)


@pytest.mark.parametrize("name", BOTH)
def test_the_objectives_gradient_is_that_of_two_plain_models(name, net, tokens, expect_close):
    """Two copies of the plain method with the drawn experts; torch's own KL and cross-entropy."""
    bare, weight, seed = deepcopy(net), 0.7, 11
    method = attached(name, net, experts_down=3, experts_up=2, consistency=weight)
    shake(method, 0.3)
    net.train()
    batch = batch_of(tokens)
    torch.manual_seed(seed)
    first, second = draws(name, method), draws(name, method)
    torch.manual_seed(seed)
    objective, nats = method.objective(*passes(net), batch)
    objective.backward()
    assert first != second
    plain, scored, targets = [], batch.targets != IGNORE, batch.targets
    for picks in (first, second):
        copy = deepcopy(bare)
        plain.append((with_experts(name, copy, method, experts_of(method, picks)), copy))
    p, q = (Categorical(logits=copy(batch.ids).logits[scored]) for _, copy in plain)
    lost = -p.log_prob(targets[scored]).sum()
    total = lost + weight * (kl_divergence(p, q) + kl_divergence(q, p)).sum() / 2
    expect_close(objective, total)
    expect_close(nats, lost)
    assert total - lost > 0.01
    total.backward()
    for index, t in enumerate(method.tensors):
        for key, p in vars(t).items():
            expected = torch.zeros_like(p)
            for picks, (twin, _) in zip((first, second), plain, strict=True):
                expected[picks[index][key]] += getattr(twin.tensors[index], key).grad
            expect_close(p.grad, expected)


def test_without_consistency_one_pass_is_enough(tokens):
    net = tiny_llama()
    method = attached("adamix", net, consistency=0)
    calls = []
    objective, nats = method.objective(
        lambda batch: calls.append("nats") or torch.tensor(3.0),
        lambda batch: calls.append("logits"),
        batch_of(tokens),
    )
    assert calls == ["nats"] and objective == nats == 3


@pytest.mark.parametrize("name", BOTH)
def test_bf16_backbone_with_float32_experts(name, net, tokens):
    method = attached(name, net)
    shake(method)
    for n, p in net.named_parameters():
        if not n.startswith("peft."):
            p.data = p.data.bfloat16()
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        objective, nats = method.objective(*passes(net), batch_of(tokens))
    assert objective > nats > 0 and objective.dtype == torch.float32
    objective.backward()
    assert all(p.grad.dtype == torch.float32 for p in method.parameters())


def test_interrupted_equals_uninterrupted(compose, tmp_path):
    """The draws go on where they were; what is left in the end is one LoRA."""

    def go(folder, **changes):
        return run(config | changes, tmp_path / folder, trial=None, job_type="train")

    config = compose("method=adamix_lora", "epochs=1")
    whole = go("whole")
    tracking = {"_target_": "test_run.SignalAt", "row": 5, "number": int(signal.SIGTERM)}
    with pytest.raises(Halted):
        go("cut", tracking=tracking)
    assert not (tmp_path / "cut" / "result.json").exists()
    resumed = go("cut")
    rows = [(tmp_path / folder / "rows.jsonl").read_text() for folder in ("whole", "cut")]
    assert rows[0] == rows[1] and len(rows[0].splitlines()) == 10
    ours, theirs = (load_file(tmp_path / f / "adapter.safetensors") for f in ("whole", "cut"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert resumed["final"] == whole["final"] and resumed["merge"] == whole["merge"]
    assert whole["final"]["train_bits_per_token"] < whole["base"]["train_bits_per_token"]
    assert whole["merge"]["ok"] and whole["merge"]["max_abs_logit_diff"] > 0
    assert {len(tensor) for tensor in ours.values()} == {1}
    stored = sum(tensor.numel() for tensor in ours.values())
    assert stored < whole["method"]["trainable_params"]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"experts_down": 0}, "method.experts_down=0: a whole number of at least 1"),
        ({"experts_up": 1.5}, "method.experts_up=1.5: a whole number of at least 1"),
        ({"consistency": -1}, "method.consistency=-1: a finite number of at least 0"),
        ({"consistency": True}, "method.consistency=True: a finite number of at least 0"),
    ],
)
def test_bad_input(name, changes, line):
    with pytest.raises(InputError) as caught:
        make(name, tiny_llama(), **changes)
    assert str(caught.value) == line

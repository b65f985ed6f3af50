from copy import deepcopy

import pytest
import torch
from conftest import VOCABULARY, attach, make, shake, tiny_gpt2

from peftlab.data import Batch
from peftlab.errors import InputError
from peftlab.fit import nats_of

MLP = {"llama": ("gate_proj", "up_proj", "down_proj"), "gpt2": ("c_fc", "mlp.c_proj")}


def batch_of(tokens):
    return Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), None, tokens[:, :-1].numel())


def four_examples():
    generator = torch.Generator().manual_seed(7)
    return batch_of(torch.randint(VOCABULARY, (4, 9), generator=generator))


def joined(module):
    """[W b] of a layer, or W."""
    parts = [module.weight] + ([] if module.bias is None else [module.bias[:, None]])
    return torch.cat(parts, 1).detach()


def test_sites_are_all_linear_layers_of_the_mlp(net):
    method = make("far", net)
    ends = MLP[net.config.model_type]
    expected = [n for n, _ in net.named_modules() if n.endswith(ends)]
    assert [site.name for site in method.sites] == expected and len(expected) == 3 * len(ends)


def test_priming_is_full_training_of_the_mlp_by_hand(net):
    """With as many examples as a step takes, the order of drawing does not matter."""
    batch, twin = four_examples(), deepcopy(net)
    method = make("far", net, priming_steps=3, priming_batch=4, priming_lr=1e-2)
    method.attach(net)
    method.prepare(lambda b: nats_of(net, b), [batch])
    layers = [twin.get_submodule(site.name) for site in method.sites]
    start = [joined(layer) for layer in layers]
    params = [p for layer in layers for p in layer.parameters()]
    for p in params:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        (nats_of(twin, batch) / batch.n_targets).backward()
        optimizer.step()
    for site, t, layer, W in zip(method.sites, method.tensors, layers, start, strict=True):
        moved = joined(layer) - W
        n = int(0.5 * site.d_out)
        assert t.rows.tolist() == sorted(moved.abs().sum(1).topk(n).indices.tolist())
        torch.testing.assert_close(t.delta.detach(), moved[t.rows], atol=1e-4, rtol=1e-3)
        assert t.delta.abs().max() > 0.01


def test_reset_starts_at_the_backbone_and_chooses_the_same_learners(net, tokens):
    twin = deepcopy(net)
    base = net(tokens).logits
    chosen = []
    for model, reset in ((net, True), (twin, False)):
        method = make("far", model, reset=reset)
        attach(method, model)
        assert method.identity is reset
        assert torch.equal(model(tokens).logits, base) is reset
        chosen.append([t.rows.tolist() for t in method.tensors])
    assert chosen[0] == chosen[1] != [list(range(len(rows))) for rows in chosen[0]]


def test_with_sgd_it_is_full_fine_tuning_of_the_learners_rows(net, tokens, expect_close):
    twin = deepcopy(net)
    method = make("far", net, reset=True)
    attach(method, net)
    start = net(tokens).logits
    layers = [twin.get_submodule(site.name) for site in method.sites]
    params = [p for layer in layers for p in layer.parameters()]
    for p in params:
        p.requires_grad_(True)
    ours = torch.optim.SGD(method.parameters(), lr=1e-2)
    theirs = torch.optim.SGD(params, lr=1e-2)
    for _ in range(4):
        for model, optimizer in ((net, ours), (twin, theirs)):
            optimizer.zero_grad()
            nats_of(model, batch_of(tokens)).backward()
            if model is twin:
                for layer, t in zip(layers, method.tensors, strict=True):
                    frozen = torch.ones(layer.out_features, dtype=torch.bool)
                    frozen[t.rows] = False
                    for p in layer.parameters():
                        p.grad[frozen] = 0
            optimizer.step()
    assert (net(tokens).logits - start).abs().max() > 0.1
    expect_close(net(tokens).logits, twin(tokens).logits, atol=1e-4)
    method.merge(net)
    for site, layer in zip(method.sites, layers, strict=True):
        expect_close(joined(site.module), joined(layer))


def test_frozen_nodes_keep_their_bits_with_adamw_and_decay(net, tokens):
    method = make("far", net)
    before = [joined(site.module) for site in method.sites]
    attach(method, net)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        nats_of(net, batch_of(tokens)).backward()
        optimizer.step()
    method.merge(net)
    for site, t, W in zip(method.sites, method.tensors, before, strict=True):
        differ = (joined(site.module) != W).any(1)
        assert torch.equal(differ.nonzero().flatten(), t.rows) and len(t.rows) == site.d_out // 2


def test_priming_leaves_nothing_behind_and_follows_the_seed(net):
    found = []
    for seed in (1, 1, 2):
        model = deepcopy(net)
        method = make("far", model, priming_steps=2, priming_batch=2)
        method.attach(model)
        torch.manual_seed(seed)
        method.prepare(lambda b, model=model: nats_of(model, b), [four_examples()])
        found.append(method.state_dict())
        hooks = [h for m in model.modules() for h in m._forward_hooks]
        assert len(hooks) == len(method.sites)
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert any(not torch.equal(found[0][key], found[2][key]) for key in found[0])


def test_bf16(tokens):
    net = tiny_gpt2().bfloat16()
    method = make("far", net)
    method.attach(net)
    shake(method)
    with torch.autocast("cpu", torch.bfloat16):
        method.prepare(lambda b: nats_of(net, b), [four_examples()])
        nats_of(net, batch_of(tokens)).backward()
    assert all(t.delta.grad.dtype == torch.float32 for t in method.tensors)
    assert all(t.delta.grad.abs().max() > 0 for t in method.tensors)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sites": ["qkv"]}, "method.sites=qkv: mlp, or some of gate, up, down: FAR"),
        ({"keep": 2}, "method.keep=2: a share in (0, 1]"),
        ({"keep": 0.01}, "method.keep=0.01: at least one of 64 nodes (transformer.h.0.mlp.c_fc)"),
        ({"priming_steps": 0}, "method.priming_steps=0: a whole number of at least 1"),
        ({"priming_batch": 0}, "method.priming_batch=0: a whole number of at least 1"),
        ({"priming_lr": 0}, "method.priming_lr=0: a finite number above 0"),
        ({"reset": 1}, "method.reset=1: true or false"),
    ],
)
def test_bad_input(changes, line):
    with pytest.raises(InputError) as caught:
        make("far", tiny_gpt2(), **changes)
    assert str(caught.value).startswith(line)

"""All methods on every device of this machine; and, without one, that no tensor is left behind."""

import math
from contextlib import nullcontext

import pytest
import torch
from conftest import NETS, VOCABULARY, make
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftlab.checkpoint import load_state, save_state
from peftlab.data import Batch
from peftlab.fit import Progress, nats_of
from peftlab.method import attached, trainable
from peftlab.methods.lora import LoRA

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU HERE: CUDA IS NOT TESTED")
DEVICES = ["cpu", pytest.param("cuda", marks=no_gpu)]
# What looks at values before the first step, which a tensor without any does not have.
VALUES = {"hf_peft": "attach", "adamix": "train mode", "adamix_lora": "train mode"}


def batch_of(seed):
    ids = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, ids.roll(-1, 1), None, 16)


class OneConstantBehind(LoRA):
    """A LoRA whose author forgot that a model may be elsewhere."""

    def factors(self, t):
        down, up = super().factors(t)
        return down, up * torch.ones(len(up), 1)


def run_elsewhere(method, net):
    """Forward, packed and not, penalty, act and merge without a value, on `meta` as if a GPU.

    A fake tensor refuses what a GPU would: to be mixed with one of another device.
    """
    method.attach(net)
    net.train(not isinstance(VALUES.get(name_of(method)), str))
    placed = (*net.named_parameters(), *net.named_buffers())
    assert [name for name, tensor in placed if tensor.device.type != "meta"] == []
    ids = torch.zeros(2, 8, dtype=torch.int64, device="meta")
    for p in method.parameters():
        p.grad = torch.zeros_like(p)
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = net.base_model(input_ids=ids, use_cache=False).last_hidden_state
        assert hidden.shape == (2, 8, 16) and hidden.device.type == "meta"
        net.base_model(input_ids=ids, position_ids=ids, use_cache=False)
        method.penalty()
        method.after_step(1, 10)
        net.eval()
        if method.mergeable:
            method.merge(net)


def name_of(method):
    return type(method).__module__.rpartition(".")[2]


@pytest.fixture
def elsewhere(monkeypatch):
    """A tiny backbone on `meta`, for which there is no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    net = NETS["llama"]()
    nn.Module.to(net, "meta")
    return net


def test_no_method_leaves_a_tensor_behind(name, elsewhere):
    if VALUES.get(name) == "attach":
        pytest.skip("peft looks at values")
    run_elsewhere(make(name, elsewhere), elsewhere)


def test_one_left_behind_is_seen(elsewhere):
    lora = make("lora", elsewhere)
    planted = OneConstantBehind(lora.sites, rank=2, alpha=2.0, dropout=0.0)
    with pytest.raises(RuntimeError, match="two devices, meta and cpu|two devices, cpu and meta"):
        run_elsewhere(planted, elsewhere)


def three_steps(net, optimizer, seeds):
    for seed in seeds:
        net.train()
        batch = batch_of(seed).to(next(net.parameters()).device)
        objective, _ = attached(net).objective(
            lambda b: nats_of(net, b),
            lambda b: net(b.ids, use_cache=False).logits.flatten(0, 1),
            batch,
        )
        (objective / batch.n_targets).backward()
        optimizer.step()
        attached(net).after_step(seed, 4)
        optimizer.zero_grad(set_to_none=True)


def prepared(name, device):
    net = nn.Module.to(NETS["llama"](), device)
    method = make(name, net)
    method.attach(net)
    batches = [batch_of(seed) for seed in (8, 9)]
    method.prepare(lambda batch: nats_of(net, batch.to(device)), batches)
    optimizer = torch.optim.AdamW([p for _, p in trainable(net)], lr=1e-2, fused=True)
    return net, method, optimizer


@pytest.mark.parametrize("device", DEVICES)
def test_trains_goes_on_and_merges(name, device, tmp_path):
    """As a run does: the same bits after a resumption, the same function after a merge."""
    net, method, optimizer = prepared(name, device)
    three_steps(net, optimizer, (1, 2))
    save_state(tmp_path / "state", net, optimizer, Progress(), rows=0, run_id="x")
    three_steps(net, optimizer, (3, 4))
    devices = {t.device.type for _, t in (*net.named_parameters(), *net.named_buffers())}
    assert devices == {device}
    other, _, again = prepared(name, device)
    load_state(tmp_path / "state", other, again)
    three_steps(other, again, (3, 4))
    for (key, p), (_, q) in zip(trainable(net), trainable(other), strict=True):
        assert torch.equal(p, q), key
    net.eval()
    batch = batch_of(5).to(device)
    with torch.no_grad():
        loss = nats_of(net, batch).item()
        assert math.isfinite(loss)
        if method.mergeable:
            method.merge(net)
            assert nats_of(net, batch).item() == pytest.approx(loss, rel=1e-4)

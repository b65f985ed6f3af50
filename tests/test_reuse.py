"""Frozen lower blocks run once per row; losses, gradients and bits are those of running them."""

import json
import os
import signal

import pytest
import torch
from conftest import NETS, attach, make
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from peftlab import reuse
from peftlab.backbone import conv1d_to_linear
from peftlab.bits import IGNORE
from peftlab.cards import method_names
from peftlab.data import Batch, pad
from peftlab.fit import nats_of
from peftlab.method import trainable
from peftlab.parts import assemble
from peftlab.reuse import Reuse, idle_blocks
from peftlab.run import Halted, run
from peftlab.sites import decoder_blocks
from peftlab.tracking import NoTracker

TOP = ("method=top_layers", "method.k=1", "method.lr=1e-3")  # of four blocks, three stand still


class Interrupt(NoTracker):
    """Sends a real signal to this process when row `row` is logged."""

    def __init__(self, row):
        self.left = row

    def log(self, row):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def go(config, folder):
    return run(config, folder, trial=None, job_type="train")


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def ids_of(*rows):
    """A batch that is to predict 0 everywhere; -1 is padding."""
    ids = torch.tensor(rows)
    targets = torch.where(ids < 0, IGNORE, 0)
    return Batch(ids.clamp(min=0), targets, None, int((ids >= 0).sum()))


def probe():
    return ids_of([3, 1, 4, 1, 5, 9])


def count_calls(net):
    """Calls of each decoder block's MLP."""
    name, _ = decoder_blocks(net)
    calls = [0] * len(net.get_submodule(name))
    for index, block in enumerate(net.get_submodule(name)):

        def count(*args, index=index):
            calls[index] += 1

        block.mlp.register_forward_hook(count)
    return calls


@pytest.mark.parametrize("kind", NETS)
def test_found_by_what_is_trained_or_hooked(kind):
    """One tensor of block i is trained: i blocks stand still, but not below a hooked one."""
    for trained in range(3):
        net = NETS[kind]()
        attach(make("top_layers", net, k=1), net)
        name, _ = decoder_blocks(net)
        blocks = net.get_submodule(name)
        net.requires_grad_(False)
        next(blocks[trained].parameters()).requires_grad_(True)
        assert idle_blocks(net, probe(), autocast=False)[0] == trained
    assert idle_blocks(net, probe(), autocast=False) == (2, 16 * 4)
    handle = blocks[1].mlp.register_forward_hook(lambda *call: None)
    assert idle_blocks(net, probe(), autocast=False)[0] == 1
    handle.remove()
    decoder = net.get_submodule(name.rpartition(".")[0])
    handle = decoder.register_forward_pre_hook(lambda *call: None)
    assert idle_blocks(net, probe(), autocast=False)[0] == 0
    handle.remove()
    blocks[0].mlp.forward = blocks[0].mlp.forward
    assert idle_blocks(net, probe(), autocast=False)[0] == 0
    del blocks[0].mlp.forward
    net.requires_grad_(False)
    net.get_input_embeddings().weight.requires_grad_(True)
    assert idle_blocks(net, probe(), autocast=False)[0] == 0


def test_every_method():
    """Alone what trains upper blocks only; peft's layers too, if they are in upper blocks only."""
    found = {}
    for name in method_names():
        net = NETS["llama"]()
        attach(make(name, net), net)
        found[name] = idle_blocks(net, probe(), autocast=False)[0]
        assert not net.training
    assert {name: n for name, n in found.items() if n} == {"top_layers": 1}
    net = NETS["llama"]()
    args = {"target_modules": ["q_proj"], "layers_pattern": "layers", "layers_to_transform": [2]}
    attach(make("hf_peft", net, peft_type="LORA", args=args), net)
    assert idle_blocks(net, probe(), autocast=False)[0] == 2


@pytest.mark.parametrize("where", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_dropout_is_seen_and_not_disturbed(where):
    rates = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0) | {where: 0.1}
    config = GPT2Config(vocab_size=11, n_embd=16, n_layer=3, n_head=4, n_positions=64, **rates)
    net = GPT2LMHeadModel(config).eval()
    conv1d_to_linear(net)
    attach(make("top_layers", net, k=1), net)
    before = torch.get_rng_state()
    assert idle_blocks(net, probe(), autocast=False)[0] == 0
    assert torch.equal(before, torch.get_rng_state())
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attn_dropout"):
            module.attn_dropout.p = 0.0
    assert idle_blocks(net, probe(), autocast=False)[0] == 2


def test_a_second_way_past_the_state_is_seen():
    """A block above that also looks at what a block below left elsewhere cannot be fed."""
    net = NETS["llama"]()
    attach(make("top_layers", net, k=1), net)
    lower, upper = net.model.layers[0], net.model.layers[2]

    class Leaving(type(lower)):
        def forward(self, *args, **kwargs):
            upper.left = super().forward(*args, **kwargs).mean()
            return super().forward(*args, **kwargs)

    class Looking(type(upper)):
        def forward(self, *args, **kwargs):
            seen, self.left = self.left, torch.tensor(1e3)
            return super().forward(*args, **kwargs) + seen

    lower.__class__, upper.__class__ = Leaving, Looking
    assert idle_blocks(net, probe(), autocast=False) == (0, 0)


@pytest.mark.parametrize("kind", NETS)
def test_losses_and_gradients_are_equal_and_lower_blocks_do_not_run(kind):
    net = NETS[kind]()
    method = make("top_layers", net, k=1)
    attach(method, net)
    net.train()
    rows = [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, -1, -1], [5, 8, -1, -1, -1, -1]]
    whole = ids_of(*rows)
    kept = Reuse(net, 2, [whole, ids_of([7, 7])], autocast=False)
    part = ids_of(*(row[:5] for row in rows[:0:-1]))  # others beside them, in another order, width
    part = part._replace(targets=torch.tensor([[1, 2, -100, -100, -100], [6, 5, 3, 1, -100]]))
    calls = count_calls(net)
    plain = nats_of(net, part)
    plain.backward()
    wanted = {name: p.grad.clone() for name, p in trainable(net)}
    assert calls == [1, 1, 1] and all(g.abs().max() > 1e-3 for g in wanted.values() if g.ndim > 1)
    net.zero_grad()
    fed = kept.feeding(nats_of)(net, part)
    fed.backward()
    assert calls == [1, 1, 2]
    assert fed.item() == pytest.approx(plain.item(), rel=1e-6)
    for name, p in trainable(net):
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-5, atol=1e-6)
    kept.feeding(nats_of)(net, ids_of([7, 7, 7]))  # never seen
    assert calls == [2, 2, 3]
    assert not any("forward" in vars(module) for module in net.modules())


def test_id_0_at_the_end_of_a_row_is_no_padding():
    net = NETS["llama"]()
    attach(make("top_layers", net, k=1), net)
    short, long = ids_of([5, 6, -1, -1]), ids_of([5, 6, 0, 0])
    kept = Reuse(net, 2, [ids_of([5, 6]), long, short], autocast=False)
    last = ids_of([5, 6, 0, 0])._replace(targets=torch.tensor([[-100, -100, -100, 4]]))
    with torch.no_grad():
        assert kept.feeding(nats_of)(net, last).item() == pytest.approx(nats_of(net, last).item())
    # packed: a document of one 0 at the end, against a longer last document
    positions = [torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1, 2]])]
    packed = [ids_of([5, 6, 0])._replace(positions=p) for p in positions]
    kept = Reuse(net, 2, packed, autocast=False)
    for batch in packed:
        last = batch._replace(targets=torch.tensor([[-100, -100, 4]]))
        with torch.no_grad():
            plain = nats_of(net, last).item()
            assert kept.feeding(nats_of)(net, last).item() == pytest.approx(plain)
    assert len(kept.rows) == 2


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_whole_run_is_the_plain_one(compose, tmp_path, packing, capsys):
    words = (*TOP, f"dataset.packing={packing}", "dataset.block_length=48", "micro_batch=3")
    on = go(compose(*words), tmp_path / "on")
    told = capsys.readouterr().err
    assert "computing the 3 lowest of 4 decoder blocks once" in told
    off = go(compose(*words, "reuse_frozen=false"), tmp_path / "off")
    assert "lowest" not in capsys.readouterr().err
    assert on["cost"]["reused_blocks"] == 3 and on["cost"]["reuse_seconds"] > 0
    assert off["cost"]["reused_blocks"] == 0 == off["cost"]["reuse_seconds"]
    assert on["cost"]["step_flops"] < 0.6 * off["cost"]["step_flops"]
    assert on["run_id"] != off["run_id"] and on["merge"] is None
    assert on["final"]["train_bits_per_token"] < on["base"]["train_bits_per_token"] - 0.5
    for fast, plain in zip(rows_of(tmp_path / "on"), rows_of(tmp_path / "off"), strict=True):
        assert fast["bits_per_token"] == pytest.approx(plain["bits_per_token"], rel=1e-6)
        if plain["phase"] == "step":
            assert fast["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


def test_interrupted_is_uninterrupted_to_the_last_bit(compose, tmp_path):
    config = compose(*TOP)
    go(config, tmp_path / "whole")
    globals()["Interrupt"] = Interrupt
    tracking = {"_target_": f"{__name__}.Interrupt", "row": 7}
    with pytest.raises(Halted):
        go(config | {"tracking": tracking}, tmp_path / "parts")
    assert go(config, tmp_path / "parts")["cost"]["reused_blocks"] == 3
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")
    whole, parts = (load_file(tmp_path / x / "adapter.safetensors") for x in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_in_bf16_states_are_those_of_the_stream(compose):
    parts = assemble(compose(*TOP, "precision=bf16"))
    kept = parts.reuse
    assert {row.dtype for row in kept.rows.values()} == {torch.bfloat16}
    batch = pad(parts.data.train.examples[:1])
    outputs = []
    parts.net.transformer.h[2].register_forward_hook(lambda *call: outputs.append(call[-1]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        nats_of(parts.net, batch)
    torch.testing.assert_close(kept.states(batch), outputs[0], rtol=2e-2, atol=2e-1)


def test_more_than_the_limit_is_not_kept(compose, monkeypatch, capsys):
    parts = assemble(compose(*TOP))
    batches = [b for s in (parts.data.train, parts.data.test) for b in parts.data.batches(s)]
    size = sum(batch.ids.numel() for batch in batches) * 192 * 4
    monkeypatch.setattr(reuse, "LIMIT", size)
    assert assemble(compose(*TOP)).reuse.n_blocks == 3
    capsys.readouterr()
    monkeypatch.setattr(reuse, "LIMIT", size - 1)
    assert assemble(compose(*TOP)).reuse is None
    assert "3 lowest of 4 decoder blocks are run again in every epoch" in capsys.readouterr().err


def test_compiled_blocks_are_skipped_too():
    """`block.compile()` sets one attribute, which is called instead of forward; so is this."""
    net = NETS["llama"]()
    attach(make("top_layers", net, k=1), net)
    batch = probe()
    kept = Reuse(net, 2, [batch], autocast=False)
    plain = nats_of(net, batch).item()
    calls = []
    for index, block in enumerate(net.model.layers):

        def compiled(*args, index=index, block=block, **kwargs):
            calls.append(index)
            return block._call_impl(*args, **kwargs)

        block._compiled_call_impl = compiled
    assert kept.feeding(nats_of)(net, batch).item() == pytest.approx(plain, rel=1e-6)
    assert calls == [2]
    assert nats_of(net, batch).item() == plain
    assert calls == [2, 0, 1, 2]

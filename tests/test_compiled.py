"""Compiled blocks compute what plain ones do, are chosen for long runs only, and leave no trace."""

import json
import os

import pytest
import torch
from conftest import attach, make, shake, tiny_llama
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from peftlab import compiled
from peftlab.errors import InputError
from peftlab.method import trainable
from peftlab.run import SHELF, run


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


# dynamo looks at every tensor that it finds
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_run_is_the_plain_one(compose, tmp_path):
    words = ["method=lora", "epochs=1", "optimizer.lr=1e-2"]
    results, rows = {}, {}
    torch._dynamo.utils.counters.clear()
    for choice in ("true", "false"):
        folder = tmp_path / choice
        results[choice] = run(
            compose(*words, f"compile={choice}"), folder, trial=0, job_type="sweep"
        )
        rows[choice] = rows_of(folder)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert results["true"]["provenance"]["compiled"] is True
    assert results["false"]["provenance"]["compiled"] is False
    assert results["true"]["cost"]["step_flops"] == results["false"]["cost"]["step_flops"]
    for fast, plain in zip(rows["true"], rows["false"], strict=True):
        assert fast["bits_per_token"] == pytest.approx(plain["bits_per_token"], rel=2e-5)
        if plain["phase"] == "step":
            assert fast["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
    assert results["true"]["merge"]["ok"]
    # the same backbone served both: nothing compiled was left on it
    assert SHELF.spare is not None
    net = SHELF.spare.backbone.net
    assert all(module._compiled_call_impl is None for module in net.modules())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graphs_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters, asked, slopes = torch._dynamo.utils.counters, [], []
    for _ in range(2):
        net = tiny_llama()
        net.set_attn_implementation("sdpa")
        method = make("lora", net)
        attach(method, net)
        shake(method)
        compiled.compile_blocks(net.train())
        counters.clear()
        with torch.autocast("cpu", torch.bfloat16):  # which LoRA leaves to combine its factors
            net(torch.arange(10).view(2, 5), use_cache=False).logits.square().sum().backward()
        asked.append(dict(counters["aot_autograd"]))
        slopes.append([p.grad for _, p in trainable(net)])
        compiled.plain_blocks(net)  # what the process itself remembers is gone
    first, again = asked
    # also for the first block, whose input, the embeddings, needs no gradient
    assert first["total"] == first["autograd_cache_miss"] == 1
    assert again["total"] == again["autograd_cache_hit"] == 1
    assert "autograd_cache_bypass" not in first | again
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*slopes, strict=True))


@pytest.mark.parametrize("method, lowest", [("lora", 0), ("top_layers", 1), ("ladder", 3)])
def test_nothing_below_what_is_trained_has_a_graph(method, lowest, monkeypatch):
    net = tiny_llama(layers=3)
    attach(make(method, net), net)
    with_slopes = []
    for block in net.model.layers:
        monkeypatch.setattr(block, "compile", lambda block=block, **how: spy(block))

    def spy(block):
        def call(hidden_states, **rest):
            with_slopes.append(hidden_states.requires_grad)
            return block._call_impl(hidden_states, **rest)

        block._compiled_call_impl = call

    compiled.compile_blocks(net.train())
    ids = torch.arange(10).view(2, 5)
    net(ids, use_cache=False).logits.sum().backward()
    assert with_slopes == [i >= lowest for i in range(3)]
    with_slopes.clear()
    with torch.no_grad():
        net(ids, use_cache=False)
    assert not any(with_slopes)


def test_graphs_are_kept_in_our_cache_unless_the_user_has_another(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    compiled.compile_blocks(tiny_llama())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "elsewhere"))
    compiled.compile_blocks(tiny_llama())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "elsewhere")


def test_auto_is_for_long_runs():
    assert not compiled.worth_it(134_515_008, 30_000)  # the default run: a minute or two
    assert compiled.worth_it(134_515_008, 300_000)
    assert not compiled.worth_it(2_222_208, 300_000)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert not compiled.worth_it(10**9, 10**9)
    with pytest.raises(InputError, match="compile=true: needs a C"):
        compiled.compile_blocks(torch.nn.Linear(1, 1))

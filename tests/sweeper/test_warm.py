"""A backbone is handed on only if it is to the bit what was loaded; runs cannot tell."""

import json

import pytest
import torch
from safetensors.torch import load_file

from peftlab import run as run_module
from peftlab.parts import assemble
from peftlab.run import run
from peftlab.warm import Shelf


def go(config, folder, job_type="sweep"):
    return run(config, folder, trial=0, job_type=job_type)


def numbers(result, folder):
    """All that a run computes: every row, every score."""
    rows = (folder / "rows.jsonl").read_text()
    adapter = load_file(folder / "adapter.safetensors")
    tensors = {name: tensor.tolist() for name, tensor in adapter.items()}
    return rows, result["final"], result["base"], result["merge"], tensors


SPOIL = ["lora", "bitfit", "full", "prefix_tuning"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_after_other_runs_equals_one_in_a_fresh_process(
    precision, compose, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_module, "SHELF", Shelf())
    config = compose("method=lora", f"precision={precision}", "epochs=1")
    alone = numbers(go(config, tmp_path / "alone", "train"), tmp_path / "alone")
    for n, name in enumerate(SPOIL):
        other = compose(f"method={name}", f"precision={precision}", "epochs=1", "optimizer.lr=1e-2")
        go(other, tmp_path / f"other{n}")
        folder = tmp_path / f"after{n}"
        assert numbers(go(config, folder), folder) == alone, name


def test_which_runs_hand_the_backbone_on(compose, tmp_path, monkeypatch):
    shelf = Shelf()
    monkeypatch.setattr(run_module, "SHELF", shelf)
    go(compose("method=lora", "epochs=1"), tmp_path / "a")
    first = shelf.spare.backbone.net
    assert not hasattr(first, "peft") and not any(p.requires_grad for p in first.parameters())
    go(compose("method=tied_lora", "epochs=1"), tmp_path / "b")
    assert shelf.spare.backbone.net is first
    diverging = compose("method=lora", "optimizer.lr=1e30", "epochs=1")
    assert go(diverging, tmp_path / "c")["status"] == "diverged"
    assert shelf.spare.backbone.net is first
    go(compose("method=full", "epochs=1"), tmp_path / "d")  # trains float32 weights in place
    assert shelf.spare is None
    go(compose("method=lora", "epochs=1", "precision=bf16"), tmp_path / "e")
    assert next(shelf.spare.backbone.net.parameters()).dtype == torch.bfloat16
    go(compose("method=lora", "epochs=1"), tmp_path / "f", "train")  # a single run keeps nothing
    assert next(shelf.spare.backbone.net.parameters()).dtype == torch.bfloat16


CHANGES = {
    "a weight": lambda net: net.transformer.h[1].mlp.c_fc.weight[3, 5].add_(1e-3),
    "a buffer": lambda net: net.register_buffer("more", torch.zeros(1)),
    "a hook": lambda net: net.transformer.h[0].register_forward_hook(lambda *_: None),
    "a tensor's hook": lambda net: net.lm_head.weight.requires_grad_().register_hook(lambda g: g),
    "another forward": lambda net: setattr(net.transformer.h[0], "forward", lambda x: x),
    "another module": lambda net: setattr(net.transformer.h[0], "mlp", torch.nn.Identity()),
    "a number": lambda net: setattr(net.transformer.ln_f, "eps", 1.0),
    "the config": lambda net: setattr(net.config, "_attn_implementation", "sdpa"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_not_handed_on(change, compose):
    shelf = Shelf()
    config = compose("model.attention=eager")
    parts = assemble(config, load=shelf.load)
    with torch.no_grad():
        CHANGES[change](parts.net)
    assert shelf.give_back(parts.backbone) is False and shelf.spare is None


def test_what_is_back_as_it_was_is_handed_on(compose):
    shelf = Shelf()
    parts = assemble(compose(), load=shelf.load)
    parts.net.train()
    assert shelf.give_back(parts.backbone) is True
    with pytest.raises(ValueError, match="not lent"):
        shelf.give_back(parts.backbone)
    assert json.dumps(shelf.spare.key)

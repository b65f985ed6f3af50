"""Compiled blocks compute what plain ones do, are chosen for long runs only, and leave no trace."""

import json

import pytest
import torch

from peftlab import compiled
from peftlab.errors import InputError
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


def test_auto_is_for_long_runs():
    assert not compiled.worth_it(134_515_008, 30_000)  # the default run: a minute or two
    assert compiled.worth_it(134_515_008, 300_000)
    assert not compiled.worth_it(2_222_208, 300_000)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert not compiled.worth_it(10**9, 10**9)
    with pytest.raises(InputError, match="compile=true: needs a C"):
        compiled.compile_blocks(torch.nn.Linear(1, 1))

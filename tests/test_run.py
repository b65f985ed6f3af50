"""Whole runs on tiny_gpt2: what they leave; that they repeat, stop, go on and diverge."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROWS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftlab.checkpoint import load_adapter
from peftlab.config import HOME, run_id
from peftlab.errors import InputError
from peftlab.files import sha256_of
from peftlab.method import trainable
from peftlab.parts import assemble
from peftlab.run import Halted, run
from peftlab.tracking import NoTracker

MODEL = HOME / "peftlab" / "assets" / "tiny_gpt2"


class SignalAt(NoTracker):
    """Sends a real signal to this process when row `row` is logged."""

    def __init__(self, row, number):
        self.left, self.number = row, number

    def log(self, row):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def adapter_of(folder):
    return load_file(folder / "adapter.safetensors")


def go(config, folder):
    return run(config, folder, trial=None, job_type="train")


def test_a_run_leaves_what_the_contract_says(compose, tmp_path):
    config = compose("method.lr=1e-4")
    result = go(config, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "rows.jsonl", "adapter.safetensors", "result.json"}
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "completed" and result["error"] is None
    assert result["run_id"] == run_id(config) and result["seed"] == 0
    assert result["final"]["train_bits_per_token"] < result["base"]["train_bits_per_token"] - 0.5
    for split in ("train", "test"):
        final = result["final"]
        bits = final[f"{split}_nats"] / math.log(2) / final[f"{split}_targets"]
        assert final[f"{split}_bits_per_token"] == pytest.approx(bits, rel=1e-12)
        assert result["dataset"][f"{split}_targets"] == final[f"{split}_targets"]
    assert [epoch["epoch"] for epoch in result["epochs"]] == [1, 2]
    assert result["epochs"][-1]["test_bits_per_token"] == result["final"]["test_bits_per_token"]
    assert result["merge"]["ok"] and 0 < result["merge"]["max_abs_logit_diff"] < 1e-3
    cost = result["cost"]
    assert cost["tokens_per_second"] > 0 and cost["peak_memory_bytes"] > 1e8
    assert result["method"]["stored_bytes"] == os.path.getsize(
        tmp_path / "run" / "adapter.safetensors"
    )
    assert result["model"]["sha256"] == sha256_of(MODEL / "model.safetensors")
    assert result["provenance"]["packages"]["torch"] == torch.__version__
    phases = [(row["phase"], row["split"], row["step"]) for row in rows_of(tmp_path / "run")]
    steps = [("step", "train", n) for n in range(1, 13)]
    assert phases == [
        ("eval", "train", 0),
        ("eval", "test", 0),
        *steps[:6],
        ("eval", "test", 6),
        *steps[6:],
        ("eval", "train", 12),
        ("eval", "test", 12),
    ]


@pytest.mark.parametrize(("kernel", "products"), [("eager", 6), ("sdpa", 7)])
def test_step_flops_are_those_of_the_matrices(compose, tmp_path, kernel, products):
    """Forward and backward of a LoRA step, counted by hand for every product with a weight."""
    config = compose("method=lora", "method.rank=2", "epochs=1", f"model.attention={kernel}")
    flops = go(config, tmp_path / "run")["cost"]["step_flops"]
    parts = assemble(config)
    (batch,) = parts.data.steps(0)[0]
    n, targets = batch.ids.numel(), batch.n_targets
    dense = sum(site.d_in * site.d_out for site in parts.method.sites)
    # Of the frozen products backward needs the input's gradient, except at the very first site.
    first = parts.method.sites[0]
    thin = sum(2 * (site.d_in + site.d_out) for site in parts.method.sites)
    model = parts.net.config
    # scores and values, the two gradients of each; sdpa computes the scores again for backward
    product = batch.ids.shape[0] * batch.ids.shape[1] ** 2 * model.n_embd
    attention = model.n_layer * product * products
    head = model.vocab_size * model.n_embd * targets * 2  # logits, and their gradient
    linear = 2 * n * dense - n * first.d_in * first.d_out + 3 * n * thin - n * 2 * first.d_in
    assert flops == pytest.approx(2 * (linear + attention + head), rel=1e-3)


def test_final_loss_equals_plain_transformers_with_merged_weights(compose, tmp_path):
    """The oracle knows nothing of our loss, padding, hooks or tally."""
    config = compose("method.lr=1e-4")
    result = go(config, tmp_path / "run")
    parts = assemble(config)
    load_adapter(parts.net, tmp_path / "run" / "adapter.safetensors")
    parts.method.merge(parts.net)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    merged = parts.net.state_dict()
    with torch.no_grad():
        for name, tensor in plain.state_dict().items():
            conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            tensor.copy_(merged[name].T if conv1d else merged[name])
    nats, targets = 0.0, 0
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        logits = plain(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        nats += F.cross_entropy(logits, torch.tensor(ids[len(prompt) :]), reduction="sum").item()
        targets += len(ids) - len(prompt)
    final = result["final"]
    assert final["train_targets"] + final["test_targets"] == targets
    assert final["train_nats"] + final["test_nats"] == pytest.approx(nats, rel=1e-4)


def test_same_config_same_numbers_in_two_processes(compose, tmp_path):
    config = compose("method.dropout=0.1", "epochs=1")
    code = (
        "import json, sys; from pathlib import Path; from peftlab.run import run;"
        "run(json.loads(sys.argv[1]), Path(sys.argv[2]), trial=None, job_type='train')"
    )
    for name in ("one", "two"):
        subprocess.run(
            [sys.executable, "-c", code, json.dumps(config), tmp_path / name], check=True
        )
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "rows.jsonl").read_bytes() == (two / "rows.jsonl").read_bytes()
    ours, theirs = adapter_of(one), adapter_of(two)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("optimizer", "number", "row"),
    [
        ("adamw", signal.SIGTERM, 5),
        ("adamw", signal.SIGINT, 8),  # the last step of the first epoch
        ("adamw", signal.SIGTERM, 2),  # before the first step
        ("sgd", signal.SIGINT, 9),
        ("adafactor", signal.SIGTERM, 11),
        ("loraplus", signal.SIGTERM, 15),  # the last step of all
    ],
)
def test_interrupted_equals_uninterrupted(compose, tmp_path, optimizer, number, row):
    more = (f"optimizer={optimizer}", "method=lora", "method.dropout=0.2")
    more += ("optimizer.momentum=0.9",) if optimizer == "sgd" else ()
    config = compose(*more)
    whole = go(config, tmp_path / "whole")
    at = f"{__name__}.SignalAt"
    stopping = config | {"tracking": {"_target_": at, "row": row, "number": int(number)}}
    with pytest.raises(Halted) as halted:
        go(stopping, tmp_path / "cut")
    assert halted.value.code == 128 + number
    assert not (tmp_path / "cut" / "result.json").exists()
    assert len(rows_of(tmp_path / "cut")) == row
    assert run_id(stopping) == run_id(config)
    resumed = go(config, tmp_path / "cut")
    assert (tmp_path / "cut" / "rows.jsonl").read_bytes() == (
        tmp_path / "whole" / "rows.jsonl"
    ).read_bytes()
    whole_adapter, cut_adapter = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert whole_adapter.keys() == cut_adapter.keys()
    assert all(torch.equal(whole_adapter[n], cut_adapter[n]) for n in whole_adapter)
    for key in ("final", "base", "run_id", "merge", "dataset"):
        assert resumed[key] == whole[key]
    assert not (tmp_path / "cut" / "checkpoint").exists()


def test_killed_goes_on_from_the_last_epoch(compose, tmp_path):
    config = compose("epochs=3")
    whole = go(config, tmp_path / "whole")
    tracking = {"_target_": "test_run.SignalAt", "row": 12, "number": int(signal.SIGKILL)}
    code = (
        "import json, sys; from pathlib import Path; from peftlab.run import run;"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r});"
        "run(json.loads(sys.argv[1]), Path(sys.argv[2]), trial=None, job_type='train')"
    )
    words = json.dumps(config | {"tracking": tracking})
    killed = subprocess.run([sys.executable, "-c", code, words, tmp_path / "cut"])
    assert killed.returncode == -signal.SIGKILL
    with (tmp_path / "cut" / "rows.jsonl").open("a") as file:
        file.write('{"torn')  # what a kill in the middle of a write leaves
    resumed = go(config, tmp_path / "cut")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert resumed["final"] == whole["final"]


@pytest.mark.parametrize(("micro_batch", "a_pass"), [(1, 64), (3, 64), (8, 0)])
def test_accumulation_changes_nothing(compose, tmp_path, monkeypatch, micro_batch, a_pass):
    """Neither rows per pass nor the passes that a step is split into, by length, do."""
    monkeypatch.setattr("peftlab.data.PASS", 10**9)  # a step is one pass
    whole = go(compose("batch=8", "micro_batch=8"), tmp_path / "whole")
    monkeypatch.setattr("peftlab.data.PASS", a_pass)
    parts = go(compose("batch=8", f"micro_batch={micro_batch}"), tmp_path / "parts")
    assert parts["cost"]["step_flops"] <= whole["cost"]["step_flops"]
    if not a_pass:  # little padding is left
        assert parts["cost"]["step_flops"] < whole["cost"]["step_flops"]
    for split in ("train", "test"):
        key = f"{split}_nats"
        assert parts["final"][key] == pytest.approx(whole["final"][key], rel=1e-5)
    ours, theirs = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "parts")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)


def test_bf16_multiplies_in_bf16_and_trains_in_float32(compose, tmp_path):
    parts = assemble(compose("precision=bf16"))
    dtypes = {p.dtype for _, p in trainable(parts.net)}
    assert dtypes == {torch.float32}
    assert parts.net.transformer.wte.weight.dtype == torch.bfloat16
    fp32 = go(compose("method.lr=1e-4"), tmp_path / "fp32")
    bf16 = go(compose("method.lr=1e-4", "precision=bf16"), tmp_path / "bf16")
    gap = fp32["final"]["train_bits_per_token"] - bf16["final"]["train_bits_per_token"]
    assert 0 < abs(gap) < 0.05  # not the same computation, nearly the same loss
    assert bf16["merge"]["ok"]


def test_full_fine_tuning_in_bf16_keeps_float32_weights(compose, tmp_path):
    result = go(compose("method=full", "method.lr=1e-3", "precision=bf16"), tmp_path / "run")
    assert result["status"] == "completed" and result["merge"] is None
    assert result["final"]["train_bits_per_token"] < result["base"]["train_bits_per_token"] - 0.5
    assert {t.dtype for t in adapter_of(tmp_path / "run").values()} == {torch.float32}


def test_divergence_stops_the_run_and_says_so(compose, tmp_path):
    result = go(compose("method=lora", "optimizer.lr=1.0", "epochs=3"), tmp_path / "far")
    assert result["status"] == "diverged"
    assert "twice the base" in result["error"] or "is nan" in result["error"]
    assert result["final"] is None and len(rows_of(tmp_path / "far")) < 15
    steps = [row for row in rows_of(tmp_path / "far") if row["phase"] == "step"]
    assert len(steps) == 6  # the epoch that showed it, kept

    config = compose("method=gamma_lora", "method.alpha=1e38", "optimizer.lr=1.0")
    result = go(config, tmp_path / "nan")
    assert result["status"] == "diverged"
    assert "is nan" in result["error"] or "is inf" in result["error"]
    assert json.loads((tmp_path / "nan" / "result.json").read_text())["status"] == "diverged"


def test_clip_bounds_what_the_optimizer_sees(compose, tmp_path):
    base = ("method=lora", "optimizer=sgd", "optimizer.lr=1.0", "optimizer.schedule=constant")
    base += ("epochs=1", "batch=32")  # one step
    config = compose(*base, "optimizer.clip=1e-3")
    parts = assemble(config)
    before = {name: p.detach().clone() for name, p in trainable(parts.net)}
    go(config, tmp_path / "run")
    after = adapter_of(tmp_path / "run")
    moved = math.sqrt(sum((after[n] - b).square().sum().item() for n, b in before.items()))
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_skip_finished_runs_nothing_again(compose, tmp_path):
    first = go(compose(), tmp_path / "run")
    before = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    again = go(compose("skip_finished=true"), tmp_path / "run")
    assert again == first
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == before


def test_a_folder_belongs_to_one_config_and_one_process(compose, tmp_path):
    config = compose("epochs=1")
    go(config, tmp_path / "run")
    with pytest.raises(InputError, match="hydra.run.dir=.*another config"):
        go(compose("epochs=1", "seed=1"), tmp_path / "run")
    from filelock import FileLock

    with FileLock(tmp_path / "run" / ".lock", is_singleton=False):
        other = "import json, sys; from pathlib import Path; from peftlab.run import run;"
        other += "run(json.loads(sys.argv[1]), Path(sys.argv[2]), trial=None, job_type='train')"
        done = subprocess.run(
            [sys.executable, "-c", other, json.dumps(config), tmp_path / "run"],
            capture_output=True,
            text=True,
        )
    assert "another process is working in it" in done.stderr


def test_run_id_knows_what_decides_the_numbers(compose):
    config = compose()
    same = ("tracking=wandb", "threads=2", "study=x", "output=elsewhere", "skip_finished=true")
    assert {run_id(compose(change)) for change in same} == {run_id(config)}
    other = ("seed=1", "epochs=1", "method.rank=4", "optimizer.eps=1e-7", "dataset.split_seed=1")
    assert len({run_id(compose(change)) for change in (*other, "seed=0")}) == 6
    bigger = config | {"method": config["method"] | {"search": {}}}
    assert run_id(bigger) == run_id(config)


def test_a_failing_run_says_failed_and_goes_on_later(compose, tmp_path):
    class Broken(NoTracker):
        def log(self, row):
            if row["step"] == 9:
                raise ValueError("planted")

    globals()["Broken"] = Broken
    config = compose()
    with pytest.raises(ValueError, match="planted"):
        go(config | {"tracking": {"_target_": f"{__name__}.Broken"}}, tmp_path / "run")
    failed = json.loads((tmp_path / "run" / "result.json").read_text())
    assert failed["status"] == "failed" and failed["error"] == "ValueError: planted"
    assert go(config, tmp_path / "run")["status"] == "completed"
    whole = go(config, tmp_path / "whole")
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole") and whole["final"]


def test_the_base_is_the_frozen_models_and_is_evaluated_once(compose, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    first = go(compose(), tmp_path / "one")
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    data = assemble(compose()).data
    nats = targets = 0
    for example in data.train.examples:
        logits = plain(example.ids[None].long()).logits[0]
        nats += F.cross_entropy(logits, example.targets.long(), reduction="sum").item()
        targets += int((example.targets >= 0).sum())
    bits = nats / math.log(2) / targets
    assert first["base"]["train_bits_per_token"] == pytest.approx(bits, rel=1e-5)
    (note,) = (tmp_path / "cache" / "base").iterdir()
    before = note.stat().st_mtime_ns
    second = go(compose("method=lora", "seed=5"), tmp_path / "two")
    assert second["base"] == first["base"] and note.stat().st_mtime_ns == before
    go(compose("dataset.split_seed=1"), tmp_path / "three")
    assert len(list((tmp_path / "cache" / "base").iterdir())) == 2


@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_packed_loss_is_the_sum_over_documents_alone(compose, tmp_path, loss_on):
    """Bits per token of packed blocks against plain transformers on each document by itself."""
    config = compose(
        "dataset.packing=true", "dataset.block_length=48", f"dataset.loss_on={loss_on}"
    )
    result = go(config, tmp_path / "run")
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    nats, targets, n_parts = 0.0, 0, 0
    for block in assemble(config).data.train.examples:
        starts = (block.positions == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], len(block.ids)], strict=True):
            logits = plain(block.ids[None, start:end].long()).logits[0]
            labels = block.targets[start:end].long()
            nats += F.cross_entropy(logits, labels, reduction="sum").item()
            targets += int((labels != -100).sum())
            n_parts += 1
    assert n_parts > len(assemble(config).data.train.examples)  # blocks with several documents
    assert result["final"]["train_targets"] == targets
    expected = nats / math.log(2) / targets
    assert result["base"]["train_bits_per_token"] == pytest.approx(expected, rel=1e-5)

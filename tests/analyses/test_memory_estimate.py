import json
from dataclasses import replace

import pytest
from conftest import NETS, attach, defaults, make

from peftlab.analyses.memory import MIB, estimated, largest_row
from peftlab.config import PACKAGE
from peftlab.method import trainable
from peftlab.recorded import read_record

LORA = ("method=lora", "method.rank=2", "seed=0")


def row(tokens, phase="step"):
    return {"tokens": tokens, "phase": phase}


def test_the_largest_step():
    rows = [row(0, "eval"), row(10), row(37), row(37, "eval"), row(40)]
    assert largest_row(rows, 4) == 7  # 27 tokens in 4 rows
    assert largest_row([row(8)], 4) == 2


def test_two_runs(finished, ask):
    folders = [finished(*LORA), finished("method=full")]
    answer = ask("memory", *folders)
    lora, full = answer["rows"]
    for found, folder in zip((lora, full), folders, strict=True):
        record = read_record(folder)
        trained = 4 * record.result["method"]["trainable_params"] / MIB
        measured = record.result["cost"]["peak_memory_bytes"] / MIB
        assert found["trained MiB"] == found["gradients MiB"] == trained
        # AdamW: two numbers for each, and the count of steps of each tensor
        assert 0 <= found["optimizer MiB"] - 2 * trained < 0.001
        assert found["measured MiB"] == measured
        assert found["rest MiB"] == pytest.approx(measured - found["estimate MiB"])
        always = found["frozen MiB"] + trained + found["optimizer MiB"]
        top = max(found["kept MiB"], found["gradients MiB"])
        assert found["estimate MiB"] == pytest.approx(always + top)
    total = read_record(folders[0]).result["model"]["total_params"]
    assert lora["frozen MiB"] == pytest.approx(4 * total / MIB, rel=0.02)  # and masks
    assert full["kept MiB"] > lora["kept MiB"]


def test_another_model_and_length(finished, ask, refused, tmp_path):
    """LoRA on a GPT-2 twice as wide has twice the trained parameters, and no measurement."""
    folder = finished(*LORA)
    own = json.loads((PACKAGE / "assets" / "tiny_gpt2" / "config.json").read_text())
    wide = tmp_path / "wide"
    wide.mkdir()
    (wide / "config.json").write_text(json.dumps({**own, "n_embd": 2 * own["n_embd"]}))
    (found,) = ask("memory", folder, "--model", wide)["rows"]
    trained = 4 * read_record(folder).result["method"]["trainable_params"] / MIB
    assert found["trained MiB"] == 2 * trained
    assert found["measured MiB"] is None and found["rest MiB"] is None
    short, long = (ask("memory", folder, "--length", n)["rows"][0]["kept MiB"] for n in (8, 16))
    assert 1.8 < long / short < 2.3
    line = refused("memory", folder, "--model", tmp_path)
    assert f"--model={tmp_path}: no folder with a model's config" in line
    assert "--length=1: a whole number from 2" in refused("memory", folder, "--length", "1")


def test_every_method_has_an_estimate(name, finished):
    """The trained bytes are those that the built method counts."""
    record = read_record(finished(*LORA))
    net = NETS["gpt2"]()
    attach(make(name, net), net)
    count = sum(p.numel() for _, p in trainable(net))
    config = {**record.config, "method": defaults(name)}
    memory = estimated(replace(record, config=config), net.config, 8)
    assert memory.trained == 4 * count and memory.peak > memory.frozen + memory.trained

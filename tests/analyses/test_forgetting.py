import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from peftlab.__main__ import main
from peftlab.analyses.forgetting import dataset
from peftlab.backbone import load_backbone
from peftlab.bits import IGNORE
from peftlab.parts import data_of
from peftlab.recorded import read_record

LORA = ("method=lora", "method.rank=2", "seed=0")
ROWS = 6


def documents(example):
    """Cut a packed row where positions begin anew."""
    starts = [0] if example.positions is None else np.flatnonzero(example.positions.numpy() == 0)
    ends = [*starts[1:], len(example.ids)]
    return [(example.ids[a:b], example.targets[a:b]) for a, b in zip(starts, ends, strict=True)]


def bits(folder, examples):
    """Bits per token by plain transformers and numpy, one document at a time."""
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lost = []
    for ids, targets in (pair for example in examples for pair in documents(example)):
        with torch.no_grad():
            logits = net(ids[None].long()).logits[0].double().numpy()
        scored = np.flatnonzero(targets.numpy() != IGNORE)
        chosen = logits[scored, targets.numpy()[scored]]
        top = logits[scored].max(1)
        lost += list(top + np.log(np.exp(logits[scored] - top[:, None]).sum(1)) - chosen)
    return np.mean(lost) / np.log(2)


def test_two_runs_against_plain_transformers(finished, ask, tmp_path):
    runs = [finished(*LORA), finished("method=full")]
    answer = ask("forgetting", *runs, "--source", "pydoc", "--rows", ROWS)
    config = read_record(runs[0]).config
    backbone = load_backbone(config["model"], precision="fp32", block_length=64)
    examples = data_of({**config, "dataset": dataset("pydoc")}, backbone).train.examples[:ROWS]
    assert len(examples) == ROWS
    before = bits(backbone.folder, examples)
    for row, folder in zip(answer["rows"], runs, strict=True):
        merged = tmp_path / folder.name
        assert main(["export", str(folder), "--to", "merged", "-o", str(merged)]) == 0
        after = bits(merged, examples)
        assert row["before bits/token"] == pytest.approx(before, abs=1e-5)
        assert row["after bits/token"] == pytest.approx(after, abs=1e-5)
        assert row["forgotten bits/token"] == pytest.approx(after - before, abs=2e-5)
        assert abs(after - before) > 1e-4
        result = read_record(folder).result
        for split in ("train", "test"):
            key = f"{split}_bits_per_token"
            gain = result["base"][key] - result["final"][key]
            assert row[f"gain, {split} bits/token"] == gain
        assert row["parameters trained"] == result["method"]["trainable_params"]
    points = [(trace["x"], trace["y"]) for trace in answer["figures"][0]["traces"]]
    expected = [
        ([row["gain, test bits/token"]], [row["forgotten bits/token"]]) for row in answer["rows"]
    ]
    assert points == expected
    assert len(points) == len(answer["rows"]) > 1


def test_who_learns_nothing_forgets_nothing(finished, ask):
    still = finished(*LORA, "optimizer.lr=1e-30")
    (row,) = ask("forgetting", still, "--source", "pydoc", "--rows", ROWS)["rows"]
    assert row["forgotten bits/token"] == 0
    assert abs(row["gain, train bits/token"]) < 1e-6


def test_what_is_refused(finished, refused):
    folder = finished(*LORA)
    line = refused("forgetting", folder, "--source", "nothing")
    assert "--source=nothing: one of bfcl, chatterbot, cmudict" in line
    line = refused("forgetting", folder, "--source", "local")
    assert f"--source=local: another data set than the one of {folder}" in line
    other = finished(*LORA, "dataset.test_size=3")
    line = refused("forgetting", folder, other, "--source", "pydoc")
    assert f"RUN={other}: a run on the data of {folder}, as the others" in line
    assert "--rows=0: a whole number from 1" in refused("forgetting", folder, "--rows", "0")


def test_the_source_is_cut_to_what_every_run_can_hold(finished, ask):
    own, length = finished(*LORA), 3
    prompted = finished("method=prompt_tuning", f"method.length={length}", "seed=0")
    most = load_backbone(read_record(own).config["model"], precision="fp32", block_length=8)
    most = most.net.config.max_position_embeddings
    assert dataset("kjv")["block_length"] > most  # the default source would not fit
    answer = ask("forgetting", own, prompted, "--rows", 4)
    assert f"each cut to {most - length} tokens." in " ".join(answer["notes"])
    first, second = answer["rows"]
    assert first["before bits/token"] == second["before bits/token"] > 1
    assert first["after bits/token"] != second["after bits/token"]

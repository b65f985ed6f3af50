"""Whole commands against the stub server: what arrives is the run."""

import json
import subprocess
import sys

import pytest
from test_cli import SMALL
from wandb_stub import KEY, Stub


@pytest.fixture
def stub():
    with Stub() as server:
        yield server


def train(tmp_path, rows_file, url, *more, key=KEY):
    words = [word for word in SMALL if not word.startswith("tracking")]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_BASE_URL": url}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if key:
        environment["WANDB_API_KEY"] = key
    command = [sys.executable, "-m", "peftlab", "train", *words, f"dataset.path={rows_file}", *more]
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )


def test_an_online_run(tmp_path, rows_file, stub):
    done = train(tmp_path, rows_file, stub.url, "seed=7")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    ((name, run),) = stub.runs.items()
    assert name == result["run_id"] and run.exit_code == 0
    assert run.fields["displayName"] == folder.name and run.fields["jobType"] == "train"
    assert set(run.fields["tags"]) == {"gamma_lora", "tiny_gpt2", "local"}
    assert run.config["seed"] == 7 and run.config["method"]["gamma"] == 750.0
    steps = [row["bits_per_token"] for row in rows if row["phase"] == "step"]
    assert [r["train/bits_per_token"] for r in run.history if "train/bits_per_token" in r] == steps
    tests = [row["bits_per_token"] for row in rows if row["split"] == "test"]
    seen = [r["epoch/test_bits_per_token"] for r in run.history if "epoch/test_bits_per_token" in r]
    assert seen == tests
    for split in ("train", "test"):
        key = f"{split}_bits_per_token"
        assert run.summary[f"final/{key}"] == result["final"][key]
    assert run.summary["trainable_params"] == result["method"]["trainable_params"]
    assert run.summary["status"] == "completed"


def test_a_sweep_is_one_group_and_a_diverged_trial_no_failure(tmp_path, rows_file, stub):
    more = ("-m", "study=mine", "method=lora", "optimizer.lr=1e-3,1e4")
    done = train(tmp_path, rows_file, stub.url, *more)
    assert done.returncode == 0, done.stderr
    runs = sorted(stub.runs.values(), key=lambda run: run.fields["displayName"])
    assert [run.fields["displayName"] for run in runs] == ["mine-0", "mine-1"]
    assert {run.fields["groupName"] for run in runs} == {"mine"}
    assert {run.fields["jobType"] for run in runs} == {"sweep"}
    assert [run.summary["status"] for run in runs] == ["completed", "diverged"]
    assert [run.exit_code for run in runs] == [0, 0]
    assert [run.config["optimizer"]["lr"] for run in runs] == [1e-3, 1e4]


def test_without_a_key_it_is_offline_and_sync_uploads_it(tmp_path, rows_file, stub):
    done = train(tmp_path, rows_file, stub.url, key=None)
    assert done.returncode == 0, done.stderr
    assert not stub.runs and list(tmp_path.glob("outputs/*/wandb/offline-run-*"))
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    environment |= {"WANDB_BASE_URL": stub.url, "WANDB_API_KEY": KEY}
    words = [sys.executable, "-m", "peftlab", "sync"]
    for line in ("1 uploaded, 0 already there, 0 failed", "0 uploaded, 1 already there, 0 failed"):
        synced = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert synced.returncode == 0 and line in synced.stdout, synced
    ((_, run),) = stub.runs.items()
    assert run.exit_code == 0 and run.summary["status"] == "completed"

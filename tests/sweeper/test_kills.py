"""SIGKILL at random moments, each time followed by the same command: nothing is lost or doubled.

Twenty kills in all; PEFTLAB_KILLS=60 multiplies them.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import durable
from test_tune import WORDS
from toy import HERE, states, sweep, trials

from peftlab.__main__ import main

TIMES = int(os.environ.get("PEFTLAB_KILLS", "20")) / 20
GIVE_UP_S = 120
TRIAL_S = 0.45  # hardly longer than a trial: so a kill comes before the study is complete


def workers_of(pid):
    """Return the worker processes of a sweeper."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            found.append(int(child))
    return found


def kill(command, folder, n_kills, progress, draw, *, workers=False):
    """Run the command until it has been killed n_kills times; return what was killed, in order.

    progress: how far the study is, a number that grows. draw: seeded; what is killed and when:
    some time after the start, or at some point of a trial.
    """
    killed = []
    while len(killed) < n_kills:
        with (folder / "stderr").open("w") as errors:
            session = subprocess.Popen(command, cwd=folder, stdout=errors, stderr=errors)
        try:
            started = time.monotonic()
            while len(killed) < n_kills and session.poll() is None:
                early = not killed or draw.random() < 0.2
                goal = progress() + (0 if early else 1)
                while progress() < goal and session.poll() is None:
                    assert time.monotonic() < started + GIVE_UP_S
                    time.sleep(0.005)
                time.sleep(draw.uniform(0, 2.0 if early else TRIAL_S))
                victims = workers_of(session.pid) if workers else []
                victim = draw.choice([session.pid, *victims])
                assert session.poll() is None, (folder / "stderr").read_text()
                os.kill(victim, signal.SIGKILL)
                killed.append("sweeper" if victim == session.pid else "worker")
                if victim == session.pid:
                    break
        finally:
            session.kill()
            assert session.wait() == -signal.SIGKILL, (folder / "stderr").read_text()
    return killed


def lines_of(path):
    return path.read_text().count("\n") if path.exists() else 0


def toy_study(folder, n_trials):
    """Return the command of a study of durable.py, and its overrides."""
    overrides = ["x=interval(-5,5)", "k=choice(1,2,3,4)", "sleep=0.03", f"log={folder}/log"]
    overrides += [f"hydra.sweeper.n_trials={n_trials}", "hydra.sweeper.sampler.n_startup_trials=5"]
    return [sys.executable, str(HERE / "durable.py"), str(folder)], overrides


def check_folders(folder, n_trials):
    """Each finished trial has a folder of its own, with the state of its own point in it."""
    done = [trial for trial in trials(folder) if trial.state.name != "FAIL"]
    assert {trial.state.name for trial in done} <= {"COMPLETE", "PRUNED"}
    assert len(done) == n_trials
    assert len({json.dumps(trial.params, sort_keys=True) for trial in done}) == n_trials
    names = {int(path.name) for path in folder.iterdir() if path.name.isdigit()}
    assert names == {trial.number for trial in trials(folder)}
    for trial in done:
        state = json.loads((folder / str(trial.number) / "state.json").read_text())
        assert state["point"] == trial.params
        if trial.state.name == "COMPLETE":
            assert (state["step"], state["total"]) == (durable.STEPS[-1], trial.value)


def listing(folder):
    return [(trial.params, trial.value, trial.intermediate_values) for trial in trials(folder)]


def test_a_sweeper_killed_again_and_again_leaves_the_uninterrupted_study(tmp_path):
    n_kills = round(10 * TIMES)
    n_trials = n_kills + 4
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    sweep(whole, *toy_study(whole, n_trials)[1], task=durable.task)
    command, overrides = toy_study(folder, n_trials)
    draw = random.Random(1)
    kill([*command, *overrides], folder, n_kills, lambda: lines_of(folder / "log"), draw)
    sweep(folder, *overrides, task=durable.task)
    check_folders(folder, n_trials)
    assert states(folder) == ["COMPLETE"] * n_trials
    assert listing(folder) == listing(whole)
    assert lines_of(folder / "log") > n_trials  # trials were interrupted, not only start-ups


def test_sweepers_and_workers_killed_with_trials_side_by_side(tmp_path):
    n_kills = round(8 * TIMES)
    n_trials = 2 * n_kills
    command, overrides = toy_study(tmp_path, n_trials)
    overrides += ["hydra/launcher=peftlab_workers", f"hydra.sweeper.retries={n_kills}"]
    overrides += ["hydra/sweeper/pruner=median"]
    words, draw = [*command, *overrides], random.Random(2)
    killed = kill(words, tmp_path, n_kills, lambda: lines_of(tmp_path / "log"), draw, workers=True)
    assert {"sweeper", "worker"} == set(killed)
    last = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    check_folders(tmp_path, n_trials)
    assert "FAIL" not in states(tmp_path)


def outcome(study):
    """All that a study of runs has computed: points, values, curves, every run's scores."""
    runs = [json.loads((study / str(t.number) / "result.json").read_text()) for t in trials(study)]
    for trial, run in zip(trials(study), runs, strict=True):
        args = {f"method.{key}": value for key, value in run["method"]["args"].items()}
        args["optimizer.lr"] = run["optimizer"]["lr"]
        assert {key: args[key] for key in trial.params} == trial.params
        assert run["final"]["train_bits_per_token"] == trial.value
    scores = [{key: run[key] for key in ("status", "final", "base")} for run in runs]
    return listing(study), scores


def test_a_killed_study_of_runs_equals_the_uninterrupted_one(rows_file, tmp_path, monkeypatch):
    n_kills = round(2 * TIMES)
    words = [*WORDS, f"dataset.path={rows_file}", "method=lora", "skip_finished=true"]
    words += [f"hydra.sweeper.n_trials={n_kills + 1}", "method.rank=choice(1,2)"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    for path in (whole, folder):
        path.mkdir()
    monkeypatch.chdir(whole)
    assert main(words) == 0
    study = folder / "outputs" / "study"

    def rows():
        return sum(map(lines_of, study.glob("*/rows.jsonl")))

    command = [sys.executable, "-m", "peftlab", *words]
    kill(command, folder, n_kills, rows, random.Random(3))
    monkeypatch.chdir(folder)
    assert main(words) == 0
    assert outcome(study) == outcome(whole / "outputs" / "study")

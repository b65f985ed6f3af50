"""`+sweeps=tune` on tiny_gpt2 through the command: it tunes, prunes, resumes and refuses."""

import json
import subprocess
import sys

import pytest
from toy import results, trials

from peftlab.__main__ import main
from peftlab.trial import due

WORDS = (
    "train -m +sweeps=tune model=tiny_gpt2 dataset=local dataset.test_size=8 tracking=none "
    "precision=fp32 threads=1 epochs=2 study=study"
).split()


@pytest.fixture
def tune(rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *more: main([*WORDS, f"dataset.path={rows_file}", *more])


def test_tunes_prunes_and_goes_on(tune, tmp_path, capfd):
    lr = "method=lora optimizer.lr=choice(1e-3,1e-2,1e-6,1e-7) method.rank=2".split()
    more = [*lr, "hydra/sweeper/sampler=grid", "hydra/sweeper/pruner=median"]
    more += ["hydra.sweeper.pruner.n_startup=2"]
    assert tune(*more, "hydra.sweeper.n_trials=2") == 0
    study = tmp_path / "outputs" / "study"
    assert tune(*more, "hydra.sweeper.n_trials=4") == 0
    runs = [json.loads((study / str(n) / "result.json").read_text()) for n in range(4)]
    assert [r["status"] for r in runs] == ["completed", "completed", "pruned", "pruned"]
    assert [r["trial"] for r in runs] == [0, 1, 2, 3] and runs[0]["study"] == "study"
    values = [r["final"]["train_bits_per_token"] for r in runs[:2]]
    assert [t.value for t in trials(study)[:2]] == values
    assert results(study)["best_value"] == min(values)
    # the online loss of the epoch so far, of 3 steps each, 6 in all; nothing at the last step
    done, pruned = trials(study)[0], trials(study)[2]
    assert list(done.intermediate_values) == [due(step, 6) for step in range(1, 6)]
    rows = [json.loads(row) for row in (study / "0" / "rows.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["phase"] == "step"]
    for n, value in enumerate(done.intermediate_values.values()):
        epoch = steps[n // 3 * 3 : n + 1]
        nats = sum(row["bits_per_token"] * row["targets"] for row in epoch)
        assert value == pytest.approx(nats / sum(row["targets"] for row in epoch))
    assert pruned.state.name == "PRUNED" and len(pruned.intermediate_values) < 5
    assert not (study / "2" / "adapter.safetensors").exists()
    capfd.readouterr()
    assert tune(*more, "hydra.sweeper.n_trials=4", "epochs=3") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("peftlab: epochs: this sweep has 3, the study study 2;")


def test_two_objectives_and_a_diverged_trial(tune, tmp_path):
    names = "objective=[train_bits_per_token,trainable_params]"
    more = ["hydra.sweeper.direction=[minimize,minimize]", "hydra/sweeper/sampler=grid", names]
    more += ["method=lora", "method.rank=choice(1,4)", "optimizer.lr=1e-3,1e30", "epochs=1"]
    assert tune(*more, "optimizer.schedule=constant") == 0
    found = results(tmp_path / "outputs" / "study")
    assert found["n_trials"]["diverged"] == 2 and found["n_trials"]["complete"] == 2
    assert {s["params"]["method.rank"] for s in found["solutions"]} <= {1, 4}
    for solution in found["solutions"]:
        text = (tmp_path / solution["dir"] / "result.json").read_text()
        result = json.loads(text)
        assert solution["values"] == [
            result["final"]["train_bits_per_token"],
            result["method"]["trainable_params"],
        ]


BAD = {
    "optimizer.lr=interval(1,0)": ("optimizer.lr=interval(1,0)", "low <= high"),
    "optimizer.lrr=interval(0,1)": ("optimizer.lrr", "no such key"),
    "hydra.sweeper.when={method.rnak: {method.rank: 2}}": ("method.rnak", "method.rank"),
    "hydra.sweeper.storage=sqlite:////sys/x.db": ("hydra.sweeper.storage", "cannot be opened"),
    "hydra.sweeper.n_jobs=2": ("hydra.sweeper.n_jobs=2", "peftlab_workers"),
    "hydra.sweeper.n_trails=2": ("hydra.sweeper.n_trails", ""),
    "objective=test_bits_per_token": ("objective=test_bits_per_token", "train_bits_per_token"),
    "method=lora,ia3": ("method.gamma", "no such key"),  # the ranges are the default method's
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input_is_one_line_and_exit_code_2(mistake, tune, tmp_path, capfd):
    method = () if mistake.startswith("method=") else ("method=lora",)
    assert tune(*method, mistake, "hydra.sweeper.n_trials=1") == 2
    captured = capfd.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith("peftlab: ") and all(part in line for part in BAD[mistake]), captured
    assert not list(tmp_path.glob("outputs/study/0/*"))


def test_one_worker_runs_a_whole_study(rows_file, tmp_path):
    words = [sys.executable, "-m", "peftlab", *WORDS, f"dataset.path={rows_file}", "method=lora"]
    words += ["hydra/launcher=peftlab_workers", "hydra/sweeper/sampler=grid", "epochs=1"]
    words += ["hydra.launcher.n_jobs=1", "method.rank=2", "optimizer.lr=1e-4,2e-4,3e-4"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    study = tmp_path / "outputs" / "study"
    assert [t.state.name for t in trials(study)] == ["COMPLETE"] * 3
    loaded = [w for w in (study / "worker-0.log").read_text().splitlines() if "loaded in" in w]
    assert len(loaded) == 3


def test_reports_are_due_twenty_times_and_never_at_the_end():
    assert [due(step, 4) for step in range(1, 5)] == [25, 50, 75, None]
    moments = [due(step, 1000) for step in range(1, 1001)]
    assert [m for m in moments if m is not None] == list(range(5, 100, 5))
    assert moments[49] == 5 and moments[50] is None

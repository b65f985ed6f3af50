"""Whole sweeps of a toy task through the real Hydra; each trial costs Hydra a fifth of a second."""

import signal

import pytest
from toy import results, states, sweep, trials

from peftlab.errors import InputError

GRID = "hydra/sweeper/sampler=grid"


def log_of(folder):
    return [line[0] for line in (folder / "log").read_text().splitlines()]


def test_what_a_sweep_leaves(tmp_path):
    n = 6
    sweep(tmp_path, "x=interval(-5,5)", "k=choice(1,2,3,4)", f"hydra.sweeper.n_trials={n}")
    found, done = results(tmp_path), trials(tmp_path)
    best = min(done, key=lambda trial: trial.value)
    assert best.value == (best.params["x"] - 2) ** 2 + abs(best.params["k"] - 3)
    assert found == {
        "name": "optuna",
        "best_params": best.params,
        "best_value": best.value,
        "best_trial": best.number,
        "best_dir": str(tmp_path / str(best.number)),
        "study_name": "study",
        "storage": "journal:${hydra.sweep.dir}/study.journal",
        "directions": ["minimize"],
        "n_trials": {
            **{"complete": n, "pruned": 0, "diverged": 0, "failed": 0},
            **{"running": 0, "interrupted": 0},
        },
    }
    assert (tmp_path / "multirun.yaml").exists()
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == list(range(n))
    assert all(len(trial.intermediate_values) == 19 for trial in done)


def test_grid_in_order_and_again_only_what_is_missing(tmp_path):
    words = ("k=1,2", "letter=a,b,c", GRID, f"log={tmp_path}/log")
    for n in (4, "null", "null"):
        sweep(tmp_path, *words, f"hydra.sweeper.n_trials={n}")
    points = [(k, letter) for k in (1, 2) for letter in "abc"]
    assert (tmp_path / "log").read_text().splitlines() == [
        f"{n} x=0.0 k={k} letter={letter} seed=0" for n, (k, letter) in enumerate(points)
    ]


def test_several_objectives(tmp_path):
    more = ("what=two", "hydra.sweeper.direction=[minimize,maximize]", GRID)
    sweep(tmp_path, "x=0,1,2,3,4", "k=3", *more)
    assert [t.values for t in trials(tmp_path)] == [[4, 0], [1, 1], [0, 2], [1, 3], [4, 4]]
    assert results(tmp_path)["solutions"] == [
        {"params": {"x": n}, "values": [(n - 2) ** 2, n], "trial": n, "dir": f"{tmp_path}/{n}"}
        for n in (2, 3, 4)
    ]


def test_repeats_and_confirmation_on_fresh_seeds(tmp_path):
    log = tmp_path / "log"
    more = ("k=1,2,3", "x=2", "seed=5", f"log={log}", GRID, "hydra.sweeper.repeats=2")
    more += ("hydra.sweeper.confirm=2", "hydra.sweeper.confirm_seeds=2")
    sweep(tmp_path, *more)
    # value = |k - 3| + seed / 10, over seeds 5 and 6
    assert [t.value for t in trials(tmp_path)] == pytest.approx([2.55, 1.55, 0.55])
    assert [t.user_attrs["spread"] for t in trials(tmp_path)] == [[pytest.approx(0.05)]] * 3
    found = results(tmp_path)
    assert found["best_trial"] == 2 and set(found["confirmed"]) == {2, 1}
    assert found["best_value"] == pytest.approx(0.75)  # seeds 7 and 8
    assert found["confirmed"][1]["seeds"] == pytest.approx({"7": 1.7, "8": 1.8})
    assert found["confirmed"][1]["spread"] == pytest.approx(0.05)
    ran = log.read_text().splitlines()
    assert len(ran) == 3 * 2 + 2 * 2 and "2 x=2 k=3 letter=a seed=8" in ran
    names = {p.name for p in tmp_path.iterdir() if p.is_dir()}
    assert {"2", "2-seed6", "2-seed7", "2-seed8"} <= names
    assert [len(t.intermediate_values) for t in trials(tmp_path)] == [19] * 3
    sweep(tmp_path, *more)
    assert log.read_text().splitlines() == ran


def test_nan_is_told_as_diverged(tmp_path):
    sweep(tmp_path, "k=1,2,3,4", "what=not_finite", GRID)
    assert states(tmp_path) == ["COMPLETE", "PRUNED"] * 2
    assert results(tmp_path)["n_trials"]["diverged"] == 2
    assert results(tmp_path)["best_trial"] == 2


def test_a_failed_trial_is_tried_again_as_the_same_trial(tmp_path):
    sweep(tmp_path, "k=1,2", "what=once", f"log={tmp_path}/log", GRID)
    assert states(tmp_path) == ["COMPLETE"] * 2
    assert log_of(tmp_path) == ["0", "0", "1", "1"]


def test_failures_are_replaced_until_there_are_too_many(tmp_path):
    more = ("x=interval(-5,5)", "what=error", "hydra.sweeper.n_trials=2", "hydra.sweeper.retries=0")
    sweep(tmp_path, *more)
    assert states(tmp_path) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert trials(tmp_path)[1].user_attrs["error"] == "RuntimeError: odd 1"
    more = (*more[:2], "hydra.sweeper.n_trials=9", *more[3:], "hydra.sweeper.max_failures=0")
    with pytest.raises(RuntimeError, match="^1 trials failed, hydra.sweeper.max_failures=0$") as e:
        sweep(tmp_path, *more)
    assert str(e.value.__cause__) == "odd 3" and states(tmp_path)[3:] == ["FAIL"]


def test_a_refused_point_is_not_tried_again_and_the_very_first_ends_the_sweep(tmp_path):
    log = f"log={tmp_path}/log"
    with pytest.raises(InputError, match="^x=0.0: above 100$"):
        sweep(tmp_path, "k=1,2,3,4", "what=refused", log, GRID)
    sweep(tmp_path, "k=1,2,3,4", "what=value", log, GRID)  # corrected: k=1 alone had failed
    assert states(tmp_path) == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert log_of(tmp_path) == ["0", "1", "2", "3"]


BAD = {
    ("x=interval(2,1)",): "low <= high",
    ("hydra.sweeper.n_trials=0",): "hydra.sweeper.n_trials=0: a whole number, at least 1",
    ("hydra.sweeper.n_jobs=2",): "hydra/launcher=peftlab_workers",
    ("hydra.sweeper.retries=-1",): "hydra.sweeper.retries=-1",
    ("hydra.sweeper.direction=up",): "minimize or maximize",
    ("hydra.sweeper.when={y: {letter: a}}",): "hydra.sweeper.when=y: no such parameter",
    ("hydra.sweeper.when={x: {letta: a}}",): "letta: neither searched nor given",
    ("hydra.sweeper.enqueue=[{y: 1}]",): "no such parameter; x",
    ("hydra.sweeper.enqueue=[{x: 9}]",): "hydra.sweeper.enqueue.x=9: must be in x=interval(-5,5)",
    ("hydra.sweeper.storage=mysql://x",): "journal:FILE, sqlite:///FILE or postgresql",
    ("hydra.sweeper.storage=postgresql://u:secret@h/d",): "oc.env",
    ("+hydra.sweeper.sampler.foo=1",): "hydra.sweeper.sampler=optuna.samplers.TPESampler",
    (GRID,): "a grid needs values that can be counted",
    ("+hydra.sweeper.pruner.foo=1",): "hydra.sweeper.pruner=optuna.pruners.NopPruner",
    ("hydra.sweeper.seed_key=letter", "hydra.sweeper.repeats=2"): "hydra.sweeper.seed_key=letter",
    ("hydra/sweeper/pruner=median", "hydra.sweeper.pruner.percentile=0"): "percentile=0",
    ("hydra/sweeper/pruner=asha", "hydra.sweeper.direction=[minimize,minimize]"): "several",
    ("k='${nothing}'",): "nothing",
    ("what=word",): "value of the job=foo: must be a number",
}


@pytest.mark.parametrize("words", BAD, ids=lambda words: words[0])
def test_bad_input_is_one_line_before_any_trial(words, tmp_path):
    ranges = () if words[0].startswith("x=") else ("x=interval(-5,5)",)
    with pytest.raises(Exception) as error:
        sweep(tmp_path, *ranges, *words)
    line = str(error.value)
    assert BAD[words] in line and "secret" not in line
    assert not isinstance(error.value, InputError) or "\n" not in line
    assert isinstance(error.value, InputError) or words == ("k='${nothing}'",)
    assert not (tmp_path / "study.journal").exists() or words == ("what=word",)


def test_ctrl_c_in_the_middle_of_a_trial_leaves_it_to_the_same_command(tmp_path):
    more = ("k=1,2,3,4", "what=interrupt", f"log={tmp_path}/log", GRID)
    with pytest.raises(SystemExit) as stop:
        sweep(tmp_path, *more)
    assert stop.value.code == 128 + signal.SIGINT
    assert states(tmp_path) == ["COMPLETE", "COMPLETE", "WAITING"]
    assert results(tmp_path)["n_trials"]["interrupted"] == 1
    sweep(tmp_path, *more)
    assert states(tmp_path) == ["COMPLETE"] * 4
    assert log_of(tmp_path) == ["0", "1", "2", "2", "3"]

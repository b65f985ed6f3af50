"""Worker processes: side by side, kept for the whole study, replaced when they die."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import optuna
import pytest
from hydra.core.config_store import ConfigStore
from toy import HERE, states, sweep, trials

from peftlab.errors import InputError
from peftlab.pruning import Percentile
from peftlab.storage import open_storage

WORKERS = "hydra/launcher=peftlab_workers"
GRID = "hydra/sweeper/sampler=grid"


def test_a_killed_worker_costs_one_attempt_and_is_replaced(tmp_path):
    more = ("k=1,2,3,4", "what=die", f"log={tmp_path}/log", GRID, WORKERS)
    sweep(tmp_path, *more)
    assert states(tmp_path) == ["COMPLETE"] * 4
    assert [t.value for t in trials(tmp_path)] == [6, 5, 4, 5]
    ran = sorted(line[0] for line in (tmp_path / "log").read_text().splitlines())
    assert ran == ["0", "1", "1", "2", "3"]
    assert len(list(tmp_path.glob("worker-*.log"))) == 3


def test_plugins_that_hydra_has_loaded_anew(tmp_path):
    """Their stored configs are then of classes that cannot be pickled any more."""

    @dataclass
    class Replaced:
        value: int = 1

    Replaced.__module__, Replaced.__qualname__ = "hydra_plugins.peftlab_sweeper.conf", "WorkersConf"
    store = ConfigStore.instance()
    store.store(group="hydra/launcher", name="replaced", node=Replaced)
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(store.load("hydra/launcher/replaced.yaml"))
    sweep(tmp_path, "k=1", GRID, WORKERS, "hydra.launcher.n_jobs=1")
    assert states(tmp_path) == ["COMPLETE"]
    del store.repo["hydra"]["launcher"]["replaced.yaml"]


def test_workers_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    sweep(tmp_path, "k=1,2", "what=threads", GRID, WORKERS, "hydra.launcher.n_jobs=2")
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [trial.value for trial in trials(tmp_path)] == [share, share]


def start(folder, *more):
    command = [sys.executable, str(HERE / "toy.py"), str(folder), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_ctrl_c_stops_the_workers_and_the_same_command_goes_on(tmp_path):
    more = ("k=1,2,3,4", f"log={tmp_path}/log", GRID, WORKERS)
    slow = start(tmp_path, *more, "sleep=0.5")
    wait_for(lambda: (tmp_path / "log").exists() and len((tmp_path / "log").read_text()) > 40)
    slow.send_signal(signal.SIGINT)  # to the sweeper alone: it passes it on
    errors = slow.communicate(timeout=60)[1]
    assert slow.returncode == 128 + signal.SIGINT, errors
    assert "no further trial starts" in errors and "the same command goes on" in errors
    assert states(tmp_path) == ["WAITING"] * 2
    sweep(tmp_path, *more[:2], GRID, "sleep=0.5", "hydra.sweeper.n_trials=2", "seed=0")
    assert states(tmp_path) == ["COMPLETE"] * 2


def test_workers_die_with_a_killed_sweeper_and_its_trials_go_on(tmp_path):
    more = ("k=1,2,3", f"log={tmp_path}/log", GRID)
    killed = start(tmp_path, *more, WORKERS, "sleep=0.2")
    wait_for(lambda: (tmp_path / "log").exists() and len((tmp_path / "log").read_text()) > 40)
    workers = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(killed.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(workers) >= 2
    killed.kill()
    killed.communicate()
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}/environ") for pid in workers), 20)
    sweep(tmp_path, *more, "sleep=0.2", "hydra.sweeper.n_trials=2")
    assert states(tmp_path) == ["COMPLETE"] * 2
    folders = {path.name for path in tmp_path.iterdir() if path.name.isdigit()}
    assert folders == {"0", "1"}


def study_with(folder, *curves):
    """Running trials with these values at steps 10, 20, ..."""
    storage = open_storage("journal:study.journal", folder)
    study = optuna.create_study(storage=storage, study_name="study")
    for curve in curves:
        trial = study.ask()
        for n, value in enumerate(curve, start=1):
            trial.report(value, 10 * n)
    return study


def frozen(study, number):
    return study.get_trials(deepcopy=False)[number]


def test_running_trials_prune_each_other_which_optunas_median_cannot(tmp_path):
    study = study_with(tmp_path, [5, 4], [6, 3], [7, 2], [9, 8], [1])
    ours = Percentile(percentile=50, n_startup=3, n_warmup=15)
    theirs = optuna.pruners.MedianPruner(n_startup_trials=0, n_min_trials=1)
    assert [ours.prune(study, frozen(study, n)) for n in range(5)] == [
        *(True, False, False, True, False)  # 4 > lower median of 3, 2, 8; the last is warming up
    ]
    assert not any(theirs.prune(study, frozen(study, n)) for n in range(5))


def test_the_percentile_its_start_and_its_direction(tmp_path):
    study = study_with(tmp_path, [5, 4], [6, 3], [7, 2], [9, 8])
    keep_quarter = Percentile(percentile=25, n_startup=3, n_warmup=0)
    assert [keep_quarter.prune(study, frozen(study, n)) for n in range(4)] == [1, 1, 0, 1]
    late = Percentile(percentile=50, n_startup=4, n_warmup=0)
    assert not any(late.prune(study, frozen(study, n)) for n in range(4))
    study.tell(3, state=optuna.trial.TrialState.FAIL)
    failed = Percentile(percentile=50, n_startup=3, n_warmup=0)
    assert not any(failed.prune(study, frozen(study, n)) for n in range(3))


@pytest.mark.parametrize("wrong", [{"percentile": 100}, {"n_startup": 0}, {"n_warmup": 100}])
def test_bad_pruners(wrong):
    with pytest.raises(InputError, match=f"hydra.sweeper.pruner.{next(iter(wrong))}="):
        Percentile(**{"percentile": 50, "n_startup": 4, "n_warmup": 20, **wrong})


def test_trials_side_by_side_are_pruned(tmp_path):
    """Both run at once, so that there is no finished trial to be compared with."""
    more = ("x=2,40", "what=together", "sleep=0.15", f"log={tmp_path}/log", GRID, WORKERS)
    pruner = ("hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup=1")
    sweep(tmp_path, *more, *pruner)
    assert states(tmp_path) == ["COMPLETE", "PRUNED"]
    good, bad = trials(tmp_path)
    assert bad.datetime_complete < good.datetime_complete

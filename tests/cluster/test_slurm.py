"""Sweeps on a real Slurm: pruned, killed, out of time, and by an array of workers.

Each process of the test run starts a Slurm and a PostgreSQL of its own, if it comes to need them.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import optuna
import pytest
import torch
from conftest import ROWS
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from postgresql_server import free_ports, need, running
from safetensors.torch import load_file
from slow import STEP

from peftlab.__main__ import main
from peftlab.config import HOME
from peftlab.run import run
from peftlab.storage import _postgresql, open_storage
from peftlab.tracking import NoTracker
from peftlab.trial import Interrupted, StudyTrial

HERE = Path(__file__).parent
TOY = HOME / "tests" / "sweeper" / "toy.py"
GRID = "hydra/sweeper/sampler=grid"
RUN = ("method=lora", "epochs=4")
STEPS = 24  # of such a run on 24 rows
RATES = ("1e-3", "3e-3")


@pytest.fixture(scope="session")
def environment():
    """The variables of a process that runs sweeps: nothing of a cluster around the tests."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return own | {"PATH": path, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def slurm(environment):
    """Variables under which Slurm's commands speak to a cluster of one node."""
    daemons = all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch"))
    need(find_spec("submitit"), "peftlab's extra slurm")
    need(os.geteuid() == 0 and daemons, "root, and Debian's packages slurm-wlm and munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # munge's socket wants a short path
    variables = {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{folder / 'bin'}{os.pathsep}{environment['PATH']}",
    }
    try:
        subprocess.run([HERE / "slurm_up.sh", folder, *map(str, free_ports(2))], check=True)
        yield environment | variables
    finally:
        subprocess.run([HERE / "slurm_down.sh", folder], check=True)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def server():
    """A PostgreSQL server that has no database of ours yet."""
    with running() as server:
        yield server


@pytest.fixture
def postgresql(server):
    """URL of a new, empty database."""
    return server.database()


def toy(folder, *words, env):
    command = [sys.executable, TOY, folder, *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return done


def words_of(rows, *, slow, dies):
    """A real sweep on the config of the fixture `compose`, but for its tracker."""
    tracker = ("_target_=slow.Slow", f"slow={slow}", f"dies={dies}", "pause=5")
    return [
        *("model=tiny_gpt2", "dataset=local", f"dataset.path={rows}", "dataset.test_size=8"),
        *("precision=fp32", "threads=1", "batch=4", *RUN, "tracking=none"),
        *(f"++tracking.{word}" for word in tracker),
    ]


def trials_of(storage, name):
    study = optuna.load_study(study_name=name, storage=open_storage(storage, Path()))
    return study.get_trials(deepcopy=False)


def wait_for(condition, seconds=150):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def same_numbers(*folders):
    """Whether two run folders hold the same, bit for bit."""
    ours, theirs = (load_file(folder / "adapter.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    ours, theirs = ((folder / "rows.jsonl").read_text() for folder in folders)
    assert ours == theirs


@pytest.fixture(scope="module")
def sweep_on_the_way(slurm, tmp_path_factory):
    """A sweep that takes longer than all else here; for two thirds of it Slurm's clock runs."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [
        *words_of(folder / "rows.jsonl", slow=0, dies=1),
        *("study=study", "hydra/sweeper=peftlab", GRID, f"optimizer.lr={','.join(RATES)}"),
        *(f"output={folder}", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=2"),
        # Slurm looks every half minute: it warns from 29 s on, and ends the job 30 s later
        *("hydra/launcher=slurm_cpu", "hydra.launcher.timeout_min=1"),
        *("hydra.launcher.signal_delay_s=1", "hydra.launcher.cpus_per_task=1"),
    ]
    command = ["peftlab", "train", "-m", *words]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=slurm, stdout=log, stderr=log)
    yield folder, process
    process.kill()
    process.wait()


def test_an_array_of_workers_shares_a_study(slurm, sweep_on_the_way, rows_file, tmp_path):
    """Task 0 dies in trial 3, task 1 is told in its first trial that its time is over."""
    words = [
        *words_of(rows_file, slow=1, dies=3),
        *("+sweeps=tune", "hydra/sweeper/sampler=random", "study=shared"),
        *("hydra.sweeper.n_trials=5", f"output={tmp_path}"),
    ]
    script = HOME / "scripts" / "worker_array.sbatch"
    command = ["sbatch", "--parsable", "--array=0-1", script, *words]

    def slurms(*words):
        return subprocess.run(
            words, env=slurm, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    array = slurms(*command).strip()

    def left():
        return slurms("squeue", "--noheader", f"--jobs={array}", "--format=%i").split()

    folder = tmp_path / "shared"
    wait_for(lambda: (folder / "killed").exists() and left() == [f"{array}_1"])
    assert slurms("squeue", "--noheader", f"--jobs={array}", "--format=%A").split() == [array]
    rows = folder / (folder / "slow").read_text() / "rows.jsonl"
    wait_for(lambda: STEP in rows.read_text())
    slurms("scancel", "--batch", "--signal=USR1", f"{array}_1")  # as 120 s before the end
    wait_for(lambda: not left())
    jobs = slurms("scontrol", "--oneliner", "show", "job", array)
    restarts = re.findall(r"ArrayTaskId=(\d) .* Restarts=(\d) ", jobs)
    assert dict(restarts) == {"0": "0", "1": "1"}, jobs  # task 1 alone is queued again
    logs = {path.stem.rpartition("_")[2]: path.read_text() for path in tmp_path.glob("slurm-*.log")}
    assert sorted(logs) == ["0", "1"]
    first, second = re.findall(rf"going on from step (\d+) of {STEPS}", logs["1"])
    assert 0 < int(first) < STEPS and second == "0", logs  # of its first trial, and trial 3
    trials = trials_of(f"journal:{folder}/study.journal", "shared")
    assert [t.state.name for t in trials] == ["COMPLETE"] * 5
    assert len({json.dumps(t.params) for t in trials}) == 5
    assert sorted(path.name for path in folder.iterdir() if path.name.isdigit()) == list("01234")
    by = [text.count(" complete with ") for text in logs.values()]
    assert sum(by) == 5 and min(by) == 2, logs


def test_a_pruned_sweep_with_postgresql_keeps_the_password_to_itself(
    slurm, sweep_on_the_way, postgresql, tmp_path
):
    folder = tmp_path / "sweep"
    words = ("x=2,40,41", "what=together", "sleep=0.1", f"log={tmp_path}/log", GRID)
    launcher = ("hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5")
    pruner = ("hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup=1")
    storage = ("hydra.sweeper.storage='${oc.env:PEFTLAB_DB}'", "hydra.sweeper.n_jobs=2")
    env = slurm | {"PEFTLAB_DB": postgresql}
    done = toy(folder, *words, *launcher, *pruner, *storage, "hydra.sweeper.n_trials=3", env=env)
    trials = trials_of(postgresql, "study")
    assert [t.state.name for t in trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert trials[0].value == 2 and trials[0].params == {"x": 2}
    texts = [done.stdout.encode(), done.stderr.encode()]
    texts += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    texts += [path.read_bytes() for path in Path(slurm["SLURM_CONF"]).parent.glob("*.log")]
    password = postgresql.split(":")[2].split("@")[0].encode()
    assert len(texts) > 20 and any(b"oc.env:PEFTLAB_DB" in text for text in texts)
    assert not any(password in text for text in texts)


def test_one_job_is_killed_and_one_runs_out_of_time(sweep_on_the_way, compose, tmp_path):
    """Trial 0 goes on from its checkpoint after Slurm's warning, trial 1 is tried again."""
    folder, process = sweep_on_the_way
    wait_for(lambda: process.poll() is not None, seconds=240)
    log = (folder / "log").read_text()
    assert process.returncode == 0, log
    assert log.count("trial 1 again") == 1 and "trial 0 again" not in log
    trials = trials_of(f"journal:{folder}/study/study.journal", "study")
    assert [t.state.name for t in trials] == ["COMPLETE", "COMPLETE"]
    jobs = [path for path in (folder / "study" / ".submitit").iterdir() if path.is_dir()]
    assert len(jobs) == 3  # trial 0 has stayed the same job, trial 1 was given another one
    texts = [next(path.glob("*_0_log.err")).read_text() for path in jobs]
    (log,) = [text for text in texts if "SIGUSR2: finishing this step" in text]
    step = int(re.findall(r"going on from step (\d+)", log)[-1])
    assert 0 < step < STEPS and f"stopped at step {step};" in log
    for number, rate in enumerate(RATES):
        config = compose(*RUN, f"dataset.path={folder}/rows.jsonl", f"optimizer.lr={rate}")
        whole = run(config, tmp_path / rate, trial=None, job_type="train")
        assert trials[number].value == whole["final"]["train_bits_per_token"]
        same_numbers(folder / "study" / str(number), tmp_path / rate)


def test_trials_of_submitit_local_wait_for_no_batch(environment, tmp_path):
    need(find_spec("submitit"), "peftlab's extra slurm")
    words = ("x=40,2,3", "sleep=0.05", GRID, "hydra/launcher=submitit_local")
    toy(tmp_path, *words, "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=3", env=environment)
    slow, quick, third = trials_of(f"journal:{tmp_path}/study.journal", "study")
    assert [t.value for t in (slow, quick, third)] == [38**2 + 2, 2, 3]
    assert quick.datetime_complete < third.datetime_start < slow.datetime_complete


def test_sweepers_that_start_at_once_make_the_tables_once(postgresql):
    url = postgresql.replace("postgresql:", "postgresql+psycopg:")
    with ThreadPoolExecutor(4) as pool:  # uncached, as in four processes
        storages = list(pool.map(lambda _: _postgresql.__wrapped__(url), range(4)))
    names = [optuna.create_study(storage=s, load_if_exists=True, study_name="a") for s in storages]
    assert len(names) == len(optuna.get_all_study_summaries(storages[0])) * 4
    for storage in storages:
        storage.engine.dispose()


TUNE = ("+sweeps=tune", "study=s", "model=tiny_gpt2", "dataset=cmudict", "tracking=none")
STORAGE = "hydra.sweeper.storage='${oc.env:PEFTLAB_DB}'"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("postgresql://u:sEcret@127.0.0.1:{port}/d", "Connection refused"),
        ("postgresql://u:sEcret@127.0.0.1:no/d", "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"),
        ("postgresql://u:p@sEcret:sEcret@h/d", "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"),
        (None, "Environment variable 'PEFTLAB_DB' not found"),
    ],
)
def test_a_database_that_is_not_there(url, text, monkeypatch, capsys, tmp_path):
    need(find_spec("psycopg"), "peftlab's extra postgresql")
    if url is not None:
        monkeypatch.setenv("PEFTLAB_DB", url.format(port=free_ports(1)[0]))
    assert main(["train", "-m", *TUNE, STORAGE, f"output={tmp_path}/out"]) == 2
    captured = capsys.readouterr()
    assert text in captured.err and captured.err.count("\n") == 1
    assert "sEcret" not in captured.out + captured.err
    assert not (tmp_path / "out" / "s" / "0").exists()


def test_a_password_on_the_command_line_is_refused(capsys):
    words = [*TUNE, "hydra.sweeper.storage='postgresql://u:sEcret@h/d'"]
    assert main(["train", "-m", *words]) == 2
    captured = capsys.readouterr()
    assert "${oc.env:NAME}" in captured.err and "sEcret" not in captured.err


@pytest.mark.parametrize("name", ["slurm_cpu", "slurm_gpu", "local_jobs", "submitit_slurm"])
def test_presets_compose_and_a_missing_package_names_the_extra(name, monkeypatch, capsys):
    need(find_spec("submitit"), "peftlab's extra slurm")
    words = ["train", f"hydra/launcher={name}", "--cfg", "hydra", "--package", "hydra.launcher"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert name in ("submitit_slurm", "local_jobs") or "requeue: true" in text
    repo = ConfigStore.instance().repo["hydra"]["launcher"]
    for file in ("submitit_slurm.yaml", "submitit_local.yaml"):
        monkeypatch.delitem(repo, file)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "pip install 'peftlab[slurm]'" in error and error.count("\n") == 1


class Signalled(NoTracker):
    """Sends SIGUSR2 or SIGTERM to this process when row `row` is logged, as Slurm does."""

    def __init__(self, row, number):
        self.left, self.number = row, number

    def log(self, row):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "leaves"), [(signal.SIGUSR2, True), (signal.SIGTERM, False)])
def test_a_foreign_handler_decides_when_all_is_saved(compose, tmp_path, number, leaves):
    """Submitit's leaves after the warning, and lets SIGTERM pass."""
    config = compose("method=lora", "method.dropout=0.2")
    whole = run(config, tmp_path / "whole", trial=None, job_type="train")
    folder = tmp_path / "cut"
    calls = []

    def handler(received, frame):
        calls.append(received)
        assert load_file(folder / "checkpoint" / "state.safetensors")
        if leaves:
            sys.exit(-1)

    before = signal.signal(number, handler)
    try:
        tracking = {"_target_": f"{__name__}.Signalled", "row": 5, "number": int(number)}
        if leaves:
            with pytest.raises(SystemExit) as left:
                run(config | {"tracking": tracking}, folder, trial=None, job_type="train")
            assert left.value.code == -1 and not (folder / "result.json").exists()
            assert len((folder / "rows.jsonl").read_text().splitlines()) == 5
            result = run(config, folder, trial=None, job_type="train")
        else:
            result = run(config | {"tracking": tracking}, folder, trial=None, job_type="train")
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert calls == [number] and result["final"] == whole["final"]
    same_numbers(folder, tmp_path / "whole")


class TakenOver(NoTracker):
    """Gives the trial to another sweeper when row 5 is logged."""

    def __init__(self, storage):
        self.left, self.storage = 5, open_storage(storage, Path())

    def log(self, row):
        self.left -= 1
        if self.left == 0:
            self.storage.set_trial_user_attr(0, "owner", "the next")


def test_a_job_that_outlives_its_sweeper_hands_its_trial_over(compose, monkeypatch, tmp_path):
    url = f"journal:{tmp_path}/study.journal"
    study = optuna.create_study(storage=open_storage(url, Path()), study_name="s")
    study.ask().set_user_attr("owner", "the first")
    pruner = {"_target_": "optuna.pruners.NopPruner"}
    settings = OmegaConf.create({"study_name": "s", "storage": url, "pruner": pruner})
    monkeypatch.setattr("peftlab.run.current_trial", lambda: StudyTrial(settings, 0, tmp_path))
    tracking = {"tracking": {"_target_": f"{__name__}.TakenOver", "storage": url}}
    config = compose("method=lora")
    with pytest.raises(Interrupted):
        run(config | tracking, tmp_path / "0", trial=0, job_type="sweep")
    assert not (tmp_path / "0" / "result.json").exists()
    assert len((tmp_path / "0" / "rows.jsonl").read_text().splitlines()) == 5
    run(config, tmp_path / "0", trial=0, job_type="sweep")
    run(config, tmp_path / "whole", trial=0, job_type="sweep")
    same_numbers(tmp_path / "0", tmp_path / "whole")
    study.tell(0, 1.0)
    with pytest.raises(Interrupted):
        StudyTrial(settings, 0, tmp_path).should_prune()

"""Storages that fail under a sweep: restarted, torn, full, and made by another version."""

import json
import logging
import os
import random
import sqlite3
import subprocess
import sys
import time
from multiprocessing import get_context

import optuna
import pytest
from postgresql_server import running
from toy import HERE, states, sweep, trials

from peftlab.errors import InputError
from peftlab.storage import _journal, open_storage

GRID = "hydra/sweeper/sampler=grid"


@pytest.fixture(autouse=True)
def another_process():
    """Storages are opened once per process; here each test, and each part of one, is like one."""
    _journal.cache_clear()
    yield
    _journal.cache_clear()


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


ALL = os.environ.get("PEFTLAB_FAULTS") == "all"


@pytest.mark.parametrize("launcher", ["peftlab_workers", *(["basic"] if ALL else [])])
def test_postgresql_restarted_under_a_sweep(server, launcher, tmp_path):
    """Three times at random moments, in each of its ways to stop; no trial is lost or doubled."""
    n, draw = 16, random.Random(launcher)
    words = ["x=interval(-5,5)", "k=choice(1,2,3,4)", "sleep=0.01", f"log={tmp_path}/log"]
    words += [
        f"hydra.sweeper.n_trials={n}",
        f"hydra/launcher={launcher}",
        "hydra.sweeper.retries=0",
    ]
    words += [
        "hydra.sweeper.storage=${oc.env:STUDY_DB}",
        "hydra.sweeper.sampler.n_startup_trials=5",
    ]
    url = server.database()
    with (tmp_path / "stderr").open("w") as errors:
        going = subprocess.Popen(
            [sys.executable, HERE / "toy.py", tmp_path, *words],
            env={**os.environ, "STUDY_DB": url},
            stdout=errors,
            stderr=errors,
        )
        try:
            for mode in ("fast", "immediate", "fast"):
                begun = lines(tmp_path / "log")
                wait_for(lambda b=begun: lines(tmp_path / "log") > b, going, tmp_path)
                time.sleep(draw.uniform(0, 0.5))
                assert going.poll() is None
                server.stop(mode)
                time.sleep(draw.uniform(0, 1.5))
                server.start()
            assert going.wait(300) == 0, (tmp_path / "stderr").read_text()
        finally:
            going.kill()
            going.wait()
    found = trials(tmp_path, storage=url)
    assert [trial.state.name for trial in found] == ["COMPLETE"] * n
    assert [trial.number for trial in found] == list(range(n))
    assert lines(tmp_path / "log") == n
    told = (tmp_path / "stderr").read_text() + "".join(
        p.read_text() for p in tmp_path.glob("*.log")
    )
    assert server.password not in told and "Traceback" not in told, told


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition, process, folder):
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < end, (folder / "stderr").read_text()
        time.sleep(0.01)


def test_a_database_that_stays_away_ends_the_sweep_with_its_reason(server, tmp_path, monkeypatch):
    from peftlab import storage

    monkeypatch.setattr(storage, "PATIENCE_S", 0.5)
    monkeypatch.setattr(storage, "RETRY_S", 0.1)
    # a command of another test may have left the handler of a log that is gone
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    study = optuna.create_study(storage=open_storage(server.database(), tmp_path))
    server.stop("fast")
    try:
        began = time.monotonic()
        with pytest.raises(Exception, match="commit|connection"):
            study.ask()
        assert 0.5 < time.monotonic() - began < 10
    finally:
        server.start()
    assert study.ask().number == 0  # and it answers again


def test_a_record_torn_in_the_middle_of_a_sweep(tmp_path):
    """Half a line, left by a writer that was killed meanwhile: the next one removes it."""
    storage = open_storage("journal:study.journal", tmp_path)
    study = optuna.create_study(storage=storage, study_name="study")
    study.tell(study.ask(), 1.0)
    path = tmp_path / "study.journal"
    whole = path.read_bytes()
    torn = b'{"op_code":4,"worker_id":"dead","study_id":0,"datet'
    with path.open("ab") as file:
        file.write(torn)
    study.tell(study.ask(), 2.0)
    assert torn not in path.read_bytes() and path.read_bytes().startswith(whole)
    assert [trial.value for trial in trials(tmp_path)] == [1.0, 2.0]
    for line in path.read_text().splitlines():
        json.loads(line)


def test_several_writers_and_torn_lines(tmp_path):
    """Three processes write while lines are torn at random: every whole record is there."""
    optuna.create_study(storage=open_storage("journal:study.journal", tmp_path), study_name="study")
    context = get_context("spawn")
    writers = [context.Process(target=write, args=(tmp_path, n)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(300)
        assert writer.exitcode == 0
    _journal.cache_clear()
    values = sorted(t.value for t in trials(tmp_path) if t.value is not None)
    assert values == sorted(float(n * 100 + k) for n in range(3) for k in range(10))


def write(folder, n):
    storage = open_storage("journal:study.journal", folder)
    study = optuna.load_study(study_name="study", storage=storage)
    for k in range(10):
        study.tell(study.ask(), float(n * 100 + k))
        with storage._backend.kernel_lock.lock, (folder / "study.journal").open("ab") as file:
            file.write(b'{"op_code":5,"tr')


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"op_code":99,"worker_id":"later"}\n', "of another version of Optuna"),
        (b'{"op_code":4}\n', "of another version of Optuna"),
        (b"\x80\x04not JSON\n", "is damaged"),
        (b'{"op_code":0,"worker\n{"op_code":0}\n', "is damaged"),
    ],
)
def test_a_journal_of_another_version_or_damaged_in_its_middle(line, told, tmp_path):
    path = tmp_path / "study.journal"
    path.write_bytes(line + line)
    with pytest.raises(InputError, match="hydra.sweeper.storage: journal .*study.journal") as error:
        sweep(tmp_path, "k=1,2", GRID)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == line + line  # nothing is thrown away


def test_tables_of_another_version(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    RDB = optuna.storages.RDBStorage
    RDB(url).engine.dispose()
    with sqlite3.connect(tmp_path / "study.db") as base:
        base.execute("UPDATE alembic_version SET version_num = 'v9.9.9'")
    with pytest.raises(InputError, match="sqlite cannot be opened .*no longer compatible") as error:
        sweep(tmp_path, "k=1,2", GRID, f"hydra.sweeper.storage={url}")
    assert "\n" not in str(error.value)


def test_a_study_of_another_version_of_ours_or_of_another_program(tmp_path):
    sweep(tmp_path, "k=1,2", GRID)
    storage = open_storage("journal:study.journal", tmp_path)
    optuna.load_study(study_name="study", storage=storage).set_user_attr("version", 99)
    with pytest.raises(InputError, match="study: its trials are of version 99, this is version 1"):
        sweep(tmp_path, "k=1,2,3", GRID)
    assert states(tmp_path) == ["COMPLETE"] * 2
    foreign = optuna.create_study(storage=storage, study_name="foreign")
    foreign.optimize(lambda trial: trial.suggest_float("y", 0, 1), n_trials=2)
    with pytest.raises(InputError, match="foreign: its trials are of another program"):
        sweep(tmp_path, "k=1,2,3", GRID, "hydra.sweeper.study_name=foreign")

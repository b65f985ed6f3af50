import json
import math
import os
import pty
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from wandb_stub import KEY, Stub

from peftlab.errors import InputError
from peftlab.sync import sync
from peftlab.tracking import NoTracker, columns

ROOT = Path(__file__).parents[1]
CONFIG = {"seed": 0, "method": {"name": "lora", "rank": 8}, "lr": 1e-3, "text": None}
NAMES = {"method": "lora", "model": "tiny_gpt2", "dataset": "kjv"}
RUN_ID = "0f" * 32


def step_row(step, bits):
    row = {"step": step, "tokens": 100 * step, "epoch": 1, "phase": "step", "split": "train"}
    return row | {"bits_per_token": bits, "targets": 100, "lr": 1e-3 / step, "grad_norm": 0.5}


def eval_row(step, epoch, split, bits):
    row = {"step": step, "tokens": 100 * step, "epoch": epoch, "phase": "eval", "split": split}
    return row | {"bits_per_token": bits, "targets": 900, "lr": None, "grad_norm": None}


ROWS = [
    eval_row(0, 0, "train", 5.25),
    eval_row(0, 0, "test", 5.5),
    *(step_row(step, 5 - step / 64) for step in range(1, 41)),
    eval_row(40, 1, "train", 4.125),
    eval_row(40, 1, "test", 4.25),
]


def expected(row):
    place = {"step": row["step"], "tokens": row["tokens"], "epoch": row["epoch"]}
    if row["phase"] == "eval":
        return place | {f"epoch/{row['split']}_bits_per_token": row["bits_per_token"]}
    numbers = {"train/bits_per_token": row["bits_per_token"], "train/lr": row["lr"]}
    return place | numbers | {"train/grad_norm": 0.5}


# W&B keeps its state per process, so each test records in processes of its own. The driver reads
# steps [what, run, arguments] and prints the seconds that each one took.
DRIVER = """
import json, os, subprocess, sys, time
from pathlib import Path
from hydra.utils import instantiate
runs, seconds = {}, []
for what, name, arguments in json.loads(sys.argv[1]):
    began = time.perf_counter()
    if what == "start":
        runs[name] = instantiate(arguments["tracking"])
        runs[name].start(**arguments["run"] | {"run_dir": Path(arguments["run"]["run_dir"])})
    elif what == "log":
        for row in arguments:
            runs[name].log(row)
    elif what == "finish":
        runs[name].finish(**arguments)
    elif what == "sleep":
        time.sleep(arguments)
    elif what in ("be killed", "kill W&B"):
        command = ["pgrep", "-P", str(os.getpid()), "wandb-core"]
        (process,) = subprocess.check_output(command).split()
        if what == "be killed":
            print(int(process), flush=True)
            process = os.getpid()
        os.kill(int(process), 9)
    seconds.append(time.perf_counter() - began)
print(json.dumps(seconds))
"""


def environment(tmp_path, url=None, key=None, **more):
    (tmp_path / "home").mkdir(exist_ok=True)
    ours = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    ours |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), **more}
    given = {"WANDB_BASE_URL": url, "WANDB_API_KEY": key}
    return ours | {name: value for name, value in given.items() if value is not None}


def tracking(**changes):
    return OmegaConf.to_container(
        OmegaConf.merge(OmegaConf.load(ROOT / "conf/tracking/wandb.yaml"), changes), resolve=True
    )


def start(run_dir, study=None, trial=None, **changes):
    run_dir.mkdir(parents=True, exist_ok=True)
    run = {"config": CONFIG, "run_dir": str(run_dir), "run_id": RUN_ID, **NAMES}
    run |= {"study": study, "trial": trial, "job_type": "train" if study is None else "sweep"}
    return ["start", str(run_dir), {"tracking": tracking(**changes), "run": run}]


def finish(run_dir, status="completed", **summary):
    return ["finish", str(run_dir), {"status": status, "summary": summary}]


def drive(steps, env):
    """Run the steps; return the seconds of each and what the terminal showed."""
    command = [sys.executable, "-c", DRIVER, json.dumps(steps)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    *lines, seconds = done.stdout.splitlines()
    return json.loads(seconds), "\n".join(lines) + done.stderr


def record(run_dir, env, rows=ROWS, study=None, trial=None, **changes):
    steps = [start(run_dir, study, trial, **changes), ["log", str(run_dir), rows], finish(run_dir)]
    return drive(steps, env)


def command(*words, env):
    """Run peftlab in an empty folder, and see that it stays empty."""
    call = [sys.executable, "-m", "peftlab", *map(str, words)]
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(call, cwd=empty, env=env, capture_output=True, text=True, timeout=180)
        assert os.listdir(empty) == []
    return done


def folders(run_dir):
    return [path.name.partition("run-")[0] + "run" for path in (run_dir / "wandb").glob("*run-*")]


@pytest.fixture
def stub():
    with Stub() as server:
        yield server
    assert server.errors == []


def test_online_run_arrives_whole(stub, tmp_path, monkeypatch, capsys):
    env = environment(tmp_path, stub.url, KEY)
    run_dir = tmp_path / "study" / "7"
    summary: dict[str, Any] = {
        "final/train_bits_per_token": 4.125,
        "final/test_bits_per_token": 4.25,
    }
    steps = [
        start(run_dir, "tune", 7, tags=["night"], entity="team"),
        ["log", str(run_dir), ROWS],
        finish(run_dir, **summary, trainable_params=1234),
    ]
    _, shown = drive(steps, env)
    assert shown == ""
    (run,) = stub.runs.values()
    assert run.config == CONFIG
    names = {"displayName": "tune-7", "groupName": "tune", "jobType": "sweep", "entity": "team"}
    assert {key: run.fields[key] for key in names} == names
    assert run.fields["project"] == "peftlab"
    assert run.fields["tags"] == ["lora", "tiny_gpt2", "kjv", "night"]
    assert run.history == [expected(row) for row in ROWS]
    last = summary | {"trainable_params": 1234, "status": "completed"}
    assert {key: run.summary[key] for key in last} == last
    assert (run.exit_code, run.uploads) == (0, 1)
    axes = {"*": "tokens", "epoch/*": "epoch", "step": None, "tokens": None, "epoch": None}
    axes |= {f"epoch/{split}_bits_per_token": "epoch" for split in ("train", "test")}
    assert run.step_metrics == axes
    secret = KEY.encode()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if secret in path.read_bytes()] == []
    assert [body for body in stub.bodies if secret in body] == []
    kept = {path.name for path in (run_dir / "wandb").glob("*/files/*")}
    assert kept == {"config.yaml", "wandb-summary.json"}
    monkeypatch.setenv("WANDB_BASE_URL", stub.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (marker,) = run_dir.glob("wandb/run-*/*.synced")
    n_asked = len(stub.bodies)
    assert sync([run_dir]) == 0 and len(stub.bodies) == n_asked
    marker.unlink()  # as earlier versions left it
    assert sync([run_dir]) == 0 and len(stub.bodies) == n_asked + 2  # 0 and 3 s later
    assert capsys.readouterr().out == 2 * "0 uploaded, 1 already there, 0 failed\n"
    assert marker.exists() and run.uploads == 1


def test_single_run_and_its_id(stub, tmp_path):
    runs = [tmp_path / "one", tmp_path / "a" / "3", tmp_path / "b" / "3", tmp_path / "b" / "4"]
    trials = [(None, None), ("s", 3), ("s", 3), ("s", 4)]
    steps = []
    for run_dir, (study, trial) in zip(runs, trials, strict=True):
        steps += [start(run_dir, study, trial), finish(run_dir)]
    drive([*steps, start(runs[1], "s", 3), finish(runs[1])], environment(tmp_path, stub.url, KEY))
    assert len(stub.runs) == 4  # the same sweep folder and trial are the same run
    one = stub.runs[RUN_ID]
    assert one.fields["displayName"] == "one"
    assert one.fields["jobType"] == "train"
    assert "groupName" not in one.fields
    names = [run.fields["displayName"] for run in stub.runs.values()]
    assert names == ["one", "s-3", "s-3", "s-4"]


def test_without_key_offline_and_no_prompt_then_sync(stub, tmp_path):
    elsewhere = netrc(tmp_path, "http://example.org")  # a key, but not for this server
    env = environment(tmp_path, stub.url, NETRC=elsewhere)
    run_dir = tmp_path / "outputs" / "one"
    steps = [start(run_dir), ["log", str(run_dir), ROWS], finish(run_dir, "diverged", last=1.5)]
    ours, theirs = pty.openpty()  # on a terminal W&B would ask
    call = [sys.executable, "-c", DRIVER, json.dumps(steps)]
    process = subprocess.Popen(call, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    assert process.wait(timeout=30) == 0
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    os.close(theirs)
    assert json.loads(shown)  # the driver's line and no other
    assert stub.runs == {}
    assert folders(run_dir) == ["offline-run"]

    refused = command("sync", tmp_path / "outputs", env=env)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "WANDB_API_KEY" in refused.stderr
    assert refused.stderr.count("\n") == 1

    env = environment(tmp_path, stub.url, KEY)
    stub.status = 401
    failed = command("sync", tmp_path / "outputs", env=env)
    assert failed.returncode == 1
    assert failed.stdout.splitlines()[-1] == "0 uploaded, 0 already there, 1 failed"
    stub.status = 200

    first = command("sync", tmp_path / "outputs", env=env)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == f"uploaded  {run_dir}\n1 uploaded, 0 already there, 0 failed\n"
    run = stub.runs[RUN_ID]
    assert run.history == [expected(row) for row in ROWS]
    assert run.config == CONFIG
    assert (run.summary["status"], run.summary["last"]) == ("diverged", 1.5)
    assert (run.exit_code, run.uploads) == (0, 1)

    second = command("sync", tmp_path / "outputs", env=env)
    assert (second.returncode, second.stdout) == (0, "0 uploaded, 1 already there, 0 failed\n")
    assert run.uploads == 1

    (data,) = run_dir.glob("wandb/*/*.wandb")
    whole = data.read_bytes()
    with Stub() as other:
        for n_bytes in (len(whole) // 2, len(whole)):  # while the run goes on, and after
            data.write_bytes(whole[:n_bytes])
            env = environment(tmp_path, other.url, KEY)
            grown = command("sync", tmp_path / "outputs", env=env)
            assert grown.stdout.endswith("1 uploaded, 0 already there, 0 failed\n")
            run = other.runs[RUN_ID]
            assert run.history == [expected(row) for row in ROWS[: len(run.history)]]
            assert (run.uploads == 1) == (0 < len(run.history) < len(ROWS))
        assert len(run.history) == len(ROWS)
        assert (run.summary["status"], run.exit_code) == ("diverged", 0)


def test_only_failed_is_a_failure(stub, tmp_path):
    statuses = ["completed", "pruned", "diverged", "stopped", "failed"]
    steps = []
    for trial, status in enumerate(statuses):
        run_dir = tmp_path / str(trial)
        steps += [start(run_dir, "s", trial), finish(run_dir, status, loss=math.nan)]
    drive(steps, environment(tmp_path, stub.url, KEY))
    runs = list(stub.runs.values())
    assert [run.summary["status"] for run in runs] == statuses
    assert [run.exit_code for run in runs] == [0, 0, 0, 0, 1]


def test_two_open_runs_do_not_mix(stub, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    steps = [start(a, "s", 0), ["log", str(a), ROWS[:5]], start(b, "s", 1)]
    steps += [["log", str(b), ROWS[5:20]], ["log", str(a), ROWS[20:]]]
    steps += [finish(a, "failed"), ["log", str(b), ROWS[:2]], finish(b)]
    drive(steps, environment(tmp_path, stub.url, KEY))
    runs = {run.fields["displayName"]: run for run in stub.runs.values()}
    assert runs["s-0"].history == [expected(row) for row in ROWS[:5] + ROWS[20:]]
    assert runs["s-1"].history == [expected(row) for row in ROWS[5:20] + ROWS[:2]]
    assert (runs["s-0"].exit_code, runs["s-1"].exit_code) == (1, 0)


def test_continued_run_is_one_whole_record(stub, tmp_path):
    run_dir = tmp_path / "one"
    env = environment(tmp_path, stub.url, KEY)
    steps = [start(run_dir), ["log", str(run_dir), ROWS[:30]], finish(run_dir, "stopped")]
    drive(steps, env)
    # run.py cuts rows.jsonl back to the checkpoint before it goes on
    (run_dir / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:25]))
    record(run_dir, env, rows=ROWS[25:])
    run = stub.runs[RUN_ID]
    assert run.history == [expected(row) for row in ROWS]
    assert run.summary["status"] == "completed"
    assert len(list(run_dir.glob("wandb/*/*.wandb"))) == 1


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_unreachable_server(silent, tmp_path):
    server = socket.create_server(("127.0.0.1", 0))  # takes connections and never answers
    url = f"http://127.0.0.1:{server.getsockname()[1]}"
    if not silent:
        server.close()
    run_dir = tmp_path / "outputs" / "one"
    env = environment(tmp_path, url, KEY)
    began = time.perf_counter()
    (started, logged, finished), shown = record(run_dir, env, mode="online", init_timeout=2)
    rest = time.perf_counter() - began - started - logged - finished
    reason = f"W&B: {url} does not answer"
    assert shown == f"{reason}; the run is recorded offline, `peftlab sync` uploads it\n"
    assert folders(run_dir) == ["offline-run"]
    assert 2 * silent < started < 20  # most of it is the import of wandb; W&B's own limit is 90
    assert logged < 5
    assert finished < 5
    assert rest < 15  # start and end of the process; W&B's error reports would take 22
    server.close()
    if not silent:
        failed = command("sync", tmp_path / "outputs", env=env)
        assert failed.returncode == 1
        assert failed.stderr == f"{url} does not answer\n"
        assert failed.stdout == f"failed    {run_dir}\n0 uploaded, 0 already there, 1 failed\n"
    with Stub() as stub:
        done = command("sync", tmp_path / "outputs", env=environment(tmp_path, stub.url, KEY))
        assert done.returncode == 0
        assert stub.runs[RUN_ID].history == [expected(row) for row in ROWS]


def test_server_that_refuses_the_key(stub, tmp_path):
    stub.status = 401
    run_dir = tmp_path / "one"
    _, shown = record(run_dir, environment(tmp_path, stub.url, KEY))
    assert shown.startswith("W&B: ")
    assert shown.endswith("; the run is recorded offline, `peftlab sync` uploads it\n")
    assert shown.count("\n") == 1
    assert folders(run_dir) == ["offline-run"]


def test_server_that_fails_during_the_run(stub, tmp_path):
    stub.stream_status = 500
    run_dir = tmp_path / "one"
    env = environment(tmp_path, stub.url, KEY)
    (_, logged, finished), shown = record(run_dir, env, finish_timeout=1)
    assert logged < 5
    assert 1 < finished < 10
    reason = "W&B: not everything was sent in 1 s"
    assert shown == f"{reason}; the run is recorded offline, `peftlab sync` uploads it\n"
    assert stub.runs[RUN_ID].history == []
    stub.stream_status = 200
    assert command("sync", tmp_path, env=env).returncode == 0
    assert stub.runs[RUN_ID].history == [expected(row) for row in ROWS]
    assert stub.runs[RUN_ID].exit_code == 0


def test_killed_wandb_process(stub, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    steps = [start(a, "s", 0), ["kill W&B", "", {}], ["log", str(a), ROWS], finish(a)]
    steps += [start(b, "s", 1), ["log", str(b), ROWS], finish(b)]
    _, shown = drive(steps, environment(tmp_path, stub.url, KEY))
    assert shown.count("\n") == 1
    assert shown.startswith("W&B: its process has ended")
    runs = {run.fields["displayName"]: run for run in stub.runs.values()}
    assert runs["s-1"].history == [expected(row) for row in ROWS]


def netrc(tmp_path, url):
    path = tmp_path / "netrc"
    path.write_text(f"machine {url.removeprefix('http://')} login user password {KEY}\n")
    path.chmod(0o600)
    return str(path)


def test_key_in_netrc(stub, tmp_path):
    record(tmp_path / "one", environment(tmp_path, stub.url, NETRC=netrc(tmp_path, stub.url)))
    assert stub.runs[RUN_ID].history == [expected(row) for row in ROWS]


def test_wandb_mode_wins(stub, tmp_path):
    env = environment(tmp_path, stub.url, KEY, WANDB_MODE="offline")
    record(tmp_path / "one", env, mode="online")
    assert stub.runs == {}
    assert folders(tmp_path / "one") == ["offline-run"]


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in [*os.environ]:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def make(**changes):
    return instantiate(tracking(**changes), _partial_=True, _convert_="all")()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "on"}, "tracking.mode=on: one of auto, online, offline"),
        ({"mode": "online"}, "tracking.mode=online: needs WANDB_API_KEY"),
        ({"tags": ["x" * 65]}, f"tracking.tags={'x' * 65}: a text of 1 to 64 characters"),
        ({"init_timeout": 0}, "tracking.init_timeout=0: a number above 0"),
        ({"finish_timeout": "1 h"}, "tracking.finish_timeout=1 h: a number above 0"),
    ],
)
def test_bad_input(changes, message, no_key):
    with pytest.raises(InputError) as caught:
        make(**changes)
    assert str(caught.value).startswith(message)


def test_bad_wandb_mode(no_key, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    with pytest.raises(InputError, match="WANDB_MODE=dryrun: one of online, offline, disabled"):
        make()
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(InputError, match="WANDB_MODE=online: needs WANDB_API_KEY"):
        make(mode="offline")


def test_disabled(no_key, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = make(mode="online")
    run = {"config": CONFIG, "run_dir": tmp_path, "run_id": RUN_ID, **NAMES, "job_type": "train"}
    tracker.start(**run, study=None, trial=None)
    tracker.log(ROWS[0])
    tracker.finish("completed", {})
    assert list(tmp_path.iterdir()) == []


def test_sync_needs_a_folder(tmp_path):
    with pytest.raises(InputError, match="DIR=.*nowhere: a folder that holds run folders"):
        sync([tmp_path / "nowhere"])


def test_no_tracker_does_nothing(tmp_path):
    tracker = instantiate(OmegaConf.load(ROOT / "conf/tracking/none.yaml"))
    assert isinstance(tracker, NoTracker)
    tracker.start(run_dir=tmp_path)
    tracker.log(ROWS[0])
    tracker.finish("completed", {})
    assert list(tmp_path.iterdir()) == []


def test_columns():
    assert columns(ROWS[1]) == {
        "step": 0,
        "tokens": 0,
        "epoch": 0,
        "epoch/test_bits_per_token": 5.5,
    }
    assert columns(step_row(2, 3.0)) == {
        "step": 2,
        "tokens": 200,
        "epoch": 1,
        "train/bits_per_token": 3.0,
        "train/lr": 5e-4,
        "train/grad_norm": 0.5,
    }

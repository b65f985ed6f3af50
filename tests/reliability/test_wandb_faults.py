"""A W&B server that misbehaves in each way: training never waits or fails, nothing is lost."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock
from test_tracking import (
    CONFIG,
    DRIVER,
    ROWS,
    RUN_ID,
    command,
    drive,
    environment,
    expected,
    finish,
    folders,
    record,
    start,
)
from wandb_stub import HISTORY, KEY, Stub, _Handler

from peftlab.wandb_record import NotARecord, said_in_the_end

SLOW_S = 30.0
INIT_S, FINISH_S = 3, 2


class Bad(Stub):
    """Answers as `how` says; `good` again once that is set."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.RequestHandlerClass = BadHandler


class BadHandler(_Handler):
    def do_GET(self):  # noqa: N802
        if self.server.how == "slow everywhere":
            time.sleep(SLOW_S)
        if self.server.how == "no HTTP":
            self.wfile.write(b"SSH-2.0-none\r\n")
            self.close_connection = True
            return
        super().do_GET()

    def do_POST(self):  # noqa: N802
        stream = self.path.endswith("/file_stream")
        match self.server.how:
            case "slow everywhere" | "slow to log in":
                time.sleep(SLOW_S)
            case "slow stream" if stream:
                time.sleep(SLOW_S)
            case "hangs up":
                self.close_connection = True
                return
            case "hangs up on the stream" if stream:
                self.close_connection = True
                return
            case "HTML":
                self.body()
                self.send_response(200)
                self.send_header("Content-Length", "6")
                self.end_headers()
                self.wfile.write(b"<html>")
                return
        super().do_POST()

    def answer(self, content, status=200):
        try:
            super().answer(content, status)
        except OSError:  # the client was tired of waiting
            self.close_connection = True


# how: (status of answers, of the stream)
WAYS = {
    "slow everywhere": (200, 200),
    "slow to log in": (200, 200),
    "slow stream": (200, 200),
    "HTML": (200, 200),
}
REFUSALS = [(403, 0), (403, 10)]  # status, rows accepted before
if os.environ.get("PEFTLAB_FAULTS") == "all":  # each takes ten seconds
    REFUSALS += [(status, 0) for status in (400, 401, 404, 409, 410)]
    WAYS |= {
        "no HTTP": (200, 200),
        "hangs up": (200, 200),
        "hangs up on the stream": (200, 200),
        "rejects": (403, 200),
        "too many requests": (429, 200),
    }


@pytest.mark.parametrize("how", WAYS)
def test_training_neither_waits_nor_fails_and_the_record_is_uploaded_later(how, tmp_path):
    with Bad(how) as server:
        server.status, server.stream_status = WAYS[how]
        run_dir = tmp_path / "outputs" / "one"
        env = environment(tmp_path, server.url, KEY)
        # The first run, which asks for no server, takes the time of importing wandb.
        steps = [start(tmp_path / "first", mode="offline"), finish(tmp_path / "first")]
        steps += [start(run_dir, init_timeout=INIT_S, finish_timeout=FINISH_S)]
        steps += [["log", str(run_dir), ROWS], finish(run_dir)]
        began = time.perf_counter()
        (*first, started, logged, finished), shown = drive(steps, env)
        rest = time.perf_counter() - began - sum(first) - started - logged - finished
        print(f"{how}: {started:.1f} s to start, {logged:.1f} to log, {finished:.1f} to finish")
        print(f"{how}: {rest:.1f} s for start and end of the process")
        assert started < 2 * INIT_S + 10
        assert logged < 3
        assert finished < FINISH_S + 10
        assert rest < SLOW_S
        assert shown.startswith("W&B: ") and shown.count("\n") == 1, shown
        assert shown.endswith("; the run is recorded offline, `peftlab sync` uploads it\n")
        assert folders(run_dir) == ["offline-run"]
    with Stub() as good:
        done = command("sync", tmp_path / "outputs", env=environment(tmp_path, good.url, KEY))
        assert done.returncode == 0, done.stderr
        assert good.runs[RUN_ID].history == [expected(row) for row in ROWS]


OFTEN = {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}  # seconds; W&B's own are 15
LONG = "x" * 70_000  # in the config: no block of a record holds it


def steps_of(run):
    return [json.loads(line)["_step"] for _, line in sorted(run.lines[HISTORY].items())]


@pytest.mark.parametrize(("status", "n_accepted"), REFUSALS)
def test_rows_that_the_server_refuses_are_kept(status, n_accepted, tmp_path):
    with Stub() as server:
        server.stream_status, server.stream_breaks_after = status, int(n_accepted > 0)
        run_dir = tmp_path / "outputs" / "one"
        env = environment(tmp_path, server.url, KEY, **OFTEN)
        begin = start(run_dir)
        begin[2]["run"]["config"] = CONFIG | {"text": LONG}
        steps = [begin, ["log", str(run_dir), ROWS[:10]], ["sleep", "", 3 * int(n_accepted > 0)]]
        steps += [["log", str(run_dir), ROWS[10:]], finish(run_dir)]
        (*_, finished), shown = drive(steps, env)
        kept = "the run is recorded offline, `peftlab sync` uploads it\n"
        assert shown == f"W&B: the server holds {n_accepted} of 44 rows; {kept}"
        assert finished < 15
        assert folders(run_dir) == ["offline-run"]
        run = server.runs[RUN_ID]
        assert run.history == [expected(row) for row in ROWS[:n_accepted]]
        if n_accepted == 0:  # W&B's own sync calls it uploaded
            refused = command("sync", tmp_path / "outputs", env=env)
            assert refused.returncode == 1
            lines = refused.stdout.splitlines()
            assert lines == [f"failed    {run_dir}", "0 uploaded, 0 already there, 1 failed"]
            assert f"{run_dir}: the server holds 0 of 44 rows\n" in refused.stderr
        server.stream_status = 200
        done = command("sync", tmp_path / "outputs", env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert run.history == [expected(row) for row in ROWS]
        assert steps_of(run) == list(range(44))
        assert run.config["text"] == LONG
        assert (run.summary["status"], run.exit_code, run.uploads) == ("completed", 0, 1)


def test_a_record_that_is_still_being_written_is_waited_for(tmp_path):
    record(tmp_path / "one", environment(tmp_path), mode="offline")
    (file,) = (tmp_path / "one").glob("wandb/*/run-*.wandb")
    whole = file.read_bytes()
    for there in (7, len(whole) // 2):  # no run yet; some rows
        file.write_bytes(whole[:there])
        writer = threading.Timer(0.5, file.write_bytes, [whole])
        writer.start()
        found = said_in_the_end(file)
        assert (found.n_rows, found.ended) == (44, True)
        writer.join()
    file.write_bytes(whole[: len(whole) // 2])
    assert not said_in_the_end(file, seconds=0.2).ended
    file.write_bytes(whole[:7])
    with pytest.raises(NotARecord):
        said_in_the_end(file, seconds=0.2)


def wait_for_end(process, seconds=60):
    """Wait until a process that is no child of ours has ended; a zombie has."""
    end = time.monotonic() + seconds
    stat = Path(f"/proc/{process}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, f"process {process} goes on"
        time.sleep(0.1)


def test_a_killed_online_run_is_uploaded_and_goes_on(tmp_path):
    with Stub() as server:
        run_dir = tmp_path / "outputs" / "one"
        env = environment(tmp_path, server.url, KEY, **OFTEN)
        steps = [start(run_dir), ["log", str(run_dir), ROWS[:10]], ["sleep", "", 3]]
        server.stream_status, server.stream_breaks_after = 500, 1
        steps += [["log", str(run_dir), ROWS[10:20]], ["sleep", "", 2], ["be killed", "", None]]
        driver = [sys.executable, "-c", DRIVER, json.dumps(steps)]
        killed = subprocess.run(driver, env=env, capture_output=True, text=True)
        assert killed.returncode == -9, killed.stderr
        wait_for_end(int(killed.stdout))  # of W&B's own process, which would send its rows now
        run = server.runs[RUN_ID]
        assert run.history == [expected(row) for row in ROWS[:10]]
        server.stream_status = 200
        with FileLock(run_dir / ".lock"):  # a run that goes on is left alone
            spared = command("sync", tmp_path / "outputs", env=env)
        assert spared.stdout == f"goes on   {run_dir}\n0 uploaded, 0 already there, 0 failed\n"
        assert len(run.history) == 10
        done = command("sync", tmp_path / "outputs", env=env)
        assert done.stdout == f"uploaded  {run_dir}\n1 uploaded, 0 already there, 0 failed\n"
        assert run.history == [expected(row) for row in ROWS[:20]]
        assert run.exit_code != 0

        (run_dir / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:15]))
        drive([start(run_dir), ["log", str(run_dir), ROWS[15:]], finish(run_dir)], env)
        assert run.history == [expected(row) for row in ROWS]
        assert steps_of(run) == list(range(44))
        assert (run.summary["status"], run.exit_code) == ("completed", 0)
        assert folders(run_dir) == ["run"]

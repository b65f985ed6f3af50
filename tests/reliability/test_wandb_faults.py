"""A W&B server that misbehaves in each way: training never waits or fails, nothing is lost."""

import os
import time

import pytest
from test_tracking import (
    ROWS,
    RUN_ID,
    command,
    drive,
    environment,
    expected,
    finish,
    folders,
    start,
)
from wandb_stub import KEY, Stub, _Handler

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
if os.environ.get("PEFTLAB_FAULTS") == "all":  # each takes ten seconds
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

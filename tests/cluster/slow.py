"""A tracker that makes a trial's first attempt slow, or ends it by SIGKILL."""

import os
import signal
import time

from peftlab.tracking import NoTracker

STEP = '"phase": "step"'  # in a line of rows.jsonl


class Slow(NoTracker):
    """slow, dies: numbers of trials. pause: seconds after each step."""

    def __init__(self, slow, dies, pause):
        self.slow, self.dies, self.pause = slow, dies, pause

    def start(self, *, trial, run_dir, **run):
        rows = run_dir / "rows.jsonl"
        again = rows.exists() and STEP in rows.read_text()
        self.sleeps = trial == self.slow and not again
        mark = run_dir.parent / "killed"
        self.killed = trial == self.dies and not mark.exists()
        if self.killed:
            mark.touch()

    def log(self, row):
        if self.killed and row["step"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.sleeps and row["phase"] == "step":
            time.sleep(self.pause)

"""A tracker that makes a trial's first attempt slow, or ends it by SIGKILL."""

import os
import signal
import time

from peftlab.tracking import NoTracker

STEP = '"phase": "step"'  # in a line of rows.jsonl


class Slow(NoTracker):
    """slow, dies: numbers of trials; in a job array `slow` is a task's. pause: seconds a step."""

    def __init__(self, slow, dies, pause):
        self.slow, self.dies, self.pause = slow, dies, pause

    def start(self, *, trial, run_dir, **run):
        def once(name):
            mark = run_dir.parent / name
            first = not mark.exists()
            mark.write_text(str(trial))
            return first

        who = int(os.environ.get("SLURM_ARRAY_TASK_ID", trial))
        self.sleeps = who == self.slow and once("slow")
        self.killed = trial == self.dies and once("killed")

    def log(self, row):
        if self.killed and row["step"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.sleeps and row["phase"] == "step":
            time.sleep(self.pause)

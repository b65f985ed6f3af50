"""Several sweepers on one study: none does another's work twice, and none leaves any undone."""

import os
import signal
import subprocess
import sys
import time

from submitit.core.utils import FailedJobError, UncompletedJobError
from toy import HERE, states, sweep, trials

from hydra_plugins.peftlab_sweeper._arm import reason_of
from peftlab.trial import current_trial

N = "hydra.sweeper.n_trials"


def test_a_living_sweeper_takes_over_what_a_dead_one_leaves(tmp_path):
    log = tmp_path / "log"
    words = [sys.executable, str(HERE / "toy.py"), str(tmp_path), "x=interval(-5,5)", f"{N}=6"]
    words += ["sleep=0.05", f"log={log}"]  # a second per trial
    with subprocess.Popen(words) as first:
        while not log.exists():
            assert first.poll() is None
            time.sleep(0.05)
        living = subprocess.Popen(words)
        while len(states(tmp_path)) < 4:  # each has had a trial, and is at another
            assert living.poll() is None
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGKILL)
    assert living.wait() == 0
    numbers = [int(line.split()[0]) for line in log.read_text().splitlines()]
    assert set(numbers) == set(range(6))
    assert states(tmp_path) == ["COMPLETE"] * 6
    assert len({trial.params["x"] for trial in trials(tmp_path)}) == 6


def test_a_trial_that_is_another_sweepers_is_left_to_it(tmp_path, capfd):
    taken = []

    def task(c):
        trial = current_trial()
        trial.report(c.x, 5)
        if not taken:
            taken.append(c.x)
            trial.storage.set_trial_user_attr(trial.id, "owner", "another")
        trial.should_prune()
        return c.x

    sweep(tmp_path, "x=interval(0,1)", f"{N}=2", task=task)
    # "another" is not alive, so that in the end its trial is taken back
    assert states(tmp_path) == ["COMPLETE", "COMPLETE"]
    told = capfd.readouterr().err
    assert "trial 0 taken over by another sweeper" in told and "failed" not in told


def test_the_reason_of_a_job_elsewhere_is_one_line():
    gone = UncompletedJobError(
        "Job 12 (task: 0) with path /x/12_0_result.pkl\nhas not produced any output "
        "(state: OUT_OF_MEMORY)\nNo error stream produced, look at stdout: /x/12_0_log.out\n-----"
    )
    raised = FailedJobError(
        "Job (task=0) failed during processing with trace:\n----------------------\nTraceback "
        "(most recent call last):\n  File x\nValueError: rank is 0\n----\nYou can check full logs"
    )
    assert reason_of(gone).endswith("result.pkl has not produced any output (state: OUT_OF_MEMORY)")
    assert reason_of(raised).endswith("with trace: ValueError: rank is 0")
    assert reason_of(RuntimeError("one line")) == "RuntimeError: one line"
    assert reason_of(RuntimeError()) == "RuntimeError: "

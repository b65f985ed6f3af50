"""The README's commands do what it says, in order; its tables name what exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from peftlab.config import HOME

README = (HOME / "README.md").read_text()
BIN = Path(sys.executable).parent


def blocks():
    return [block.splitlines() for block in re.findall(r"```bash\n(.*?)```", README, re.S)]


def run_line(line, cwd):
    words = shlex.split(line, comments=True)
    words[0] = str(BIN / Path(words[0]).name)
    environment = {**os.environ, "WANDB_MODE": "offline"}
    environment.pop("OMP_NUM_THREADS", None)  # as a user would have it
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_main_job_learns_and_gives_the_readmes_numbers(tmp_path):
    install, main_job = blocks()[0]
    assert "pip install" in install and "'.[dev]'" in install  # done: this test runs in its result
    out = run_line(main_job, tmp_path)
    train, test = re.search(r"after training, bits per token │ (\S+) │ (\S+)", out).groups()
    assert float(train) < 0.4 and float(test) < 0.6  # from about 2 bits
    expected = re.search(r"after training, bits per token │ (\S+) │ (\S+)", README).groups()
    assert abs(float(train) - float(expected[0])) < 0.1  # another CPU rounds differently
    assert abs(float(test) - float(expected[1])) < 0.1
    assert "within the tolerance" in out


def test_the_other_commands_run(tmp_path):
    lines = blocks()[2]
    assert len(lines) == 9
    outputs = [run_line(line, tmp_path) for line in lines]
    assert "after training" in outputs[0]
    assert "after training" in outputs[1]
    assert outputs[2].count("after training, bits") == 6
    assert outputs[3].count("after training, bits") == 4
    assert "lora (nf4)" in outputs[4] and (tmp_path / "report.html").stat().st_size > 2**20
    assert "| method |" in outputs[5].lower()
    assert "gamma_lora" in outputs[7] and "W' = W + s diag(v) B diag(u) A" in outputs[8]


def test_the_test_command_is_this_one():
    assert blocks()[1] == [".venv/bin/pytest"]


def test_tables_name_all_that_exists():
    for group in ("model", "method", "optimizer", "dataset", "tracking"):
        (row,) = re.findall(rf"^\| `{group}=` \| (.*) \|$", README, re.M)
        named = {words.split()[0] for words in re.findall(r"`([^`]+)`", row)} - {"peftlab"}
        files = {path.stem for path in (HOME / "conf" / group).glob("*.yaml")} - {"schedule"}
        assert named == files, group
    sweeps = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", README, re.M)
    named = {word for row in sweeps for word in re.findall(r"`(\w+)`", row)}
    assert named == {path.stem for path in (HOME / "sweeps").glob("*.yaml")}

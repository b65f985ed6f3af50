"""Planted secrets: looked for in every file, line printed, process title and request."""

import json
import os
import secrets
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from faults import SMALL
from postgresql_server import running
from wandb_stub import KEY, Stub

SWEEP = (
    "-m +sweeps=tune method=ia3 hydra/launcher=peftlab_workers hydra.launcher.n_jobs=1 "
    "hydra.sweeper.n_trials=2 hydra.sweeper.storage=${oc.env:STUDY_DB} study=s tracking=wandb"
).split()


@pytest.fixture
def home(tmp_path):
    for name in ("home", "scratch", "work"):
        (tmp_path / name).mkdir()
    return tmp_path


def environment(home, **planted):
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "HF_TOKEN"))}
    own = {"HOME": str(home / "home"), "TMPDIR": str(home / "scratch")}
    return keep | own | {"PEFTLAB_CACHE": str(home / "cache"), **planted}


class Titles(threading.Thread):
    """Reads the titles of all processes, again and again."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen, self.done = set(), threading.Event()

    def run(self):
        while not self.done.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(path.read_bytes())
                except OSError:  # it has ended
                    continue


DRIVER = """
import json, os, sys, traceback
from peftlab.__main__ import main
for words, more in json.load(sys.stdin):
    before = dict(os.environ)
    os.environ.update(more)
    try:
        code = main(words)
    except BaseException:
        traceback.print_exc()
        code = 1
    os.environ.clear()
    os.environ.update(before)
    print("code", code, file=sys.stderr, flush=True)
"""


def told(home, words, env, **more):
    """Run a command of Python; return all that it printed."""
    call = [sys.executable, *words]
    done = subprocess.run(
        call, cwd=home / "work", env=env, capture_output=True, timeout=600, **more
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout + done.stderr


def places(home, hidden):
    """Files below `home` whose name or content holds a secret."""
    found = []
    for path in home.rglob("*"):
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found += [path for secret in hidden if secret in content or secret in os.fsencode(path)]
    return found


def test_keys_and_passwords_stay_in_the_environment(home, rows_file):
    """A sweep with W&B and PostgreSQL, its report, its upload, a run again, and its errors."""
    titles, secret = Titles(), secrets.token_hex(16)
    with running() as server, Stub() as stub:
        url = server.database()
        planted = {
            "STUDY_DB": url,
            "WANDB_API_KEY": KEY,
            "WANDB_BASE_URL": stub.url,
            "HF_TOKEN": f"hf_{secrets.token_hex(20)}",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        }
        hidden = [server.password, KEY, secret]
        hidden += [planted["HF_TOKEN"], planted["AWS_SECRET_ACCESS_KEY"]]
        hidden = [text.encode() for text in hidden]
        env = environment(home, **planted)
        titles.start()
        one = ["train", *SMALL, f"dataset.path={rows_file}"]
        words = [*one, *SWEEP]
        printed = told(home, ["-m", "peftlab", *words], env)
        other = url.replace(server.password, server.password + "x")
        away = {"WANDB_BASE_URL": f"http://user:{secret}@127.0.0.1:9"}
        index = {"PIP_INDEX_URL": f"http://user:{secret}@127.0.0.1:9/simple", "PIP_RETRIES": "0"}
        full = {"HYDRA_FULL_ERROR": "1"}
        cases = [
            (0, ["report", "outputs"], {}),
            (0, ["reproduce", "outputs/s/0"], {}),
            # what fails: a study that differs, a database that is not there, another password,
            # what is no address, and an index and a W&B server whose addresses hold a password
            (2, [*words, "seed=1"], {}),
            (2, words, {"STUDY_DB": url + "x"}),
            (2, words, {"STUDY_DB": other}),
            (2, words, {"STUDY_DB": url.replace("://", ":/")}),
            (1, words, {"STUDY_DB": url + "x"} | full),
            (2, [w for w in one if "dataset" not in w] + ["dataset=chatterbot"], index),
            (0, [*one, "tracking=wandb", "method=ia3", "epochs=1"], away),
            (1, ["sync", "outputs"], away),
            (0, ["sync", "outputs"], {}),
        ]
        todo = json.dumps([case[1:] for case in cases]).encode()
        more = told(home, ["-c", DRIVER], env, input=todo)
        codes = [int(line.split()[1]) for line in more.splitlines() if line.startswith(b"code ")]
        assert codes == [case[0] for case in cases], more.decode()
        assert more.count(b"http://127.0.0.1:9 does not answer") == 2
        titles.done.set()
        titles.join()
        assert places(home, hidden) == []
        assert [secret for secret in hidden if secret in printed + more] == []
        assert any(b"peftlab" in title and b"+sweeps=tune" in title for title in titles.seen)
        assert [title for title in titles.seen for secret in hidden if secret in title] == []
        assert len(stub.runs) == 3 and len(list(home.rglob("*.wandb"))) == 3
        assert [body for body in stub.bodies for secret in hidden if secret in body] == []
    (home / "work" / "leak").write_bytes(hidden[0])  # the search itself can find
    assert places(home, hidden) == [home / "work" / "leak"]

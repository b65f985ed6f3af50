"""What the tests of faults share: a small run's words, planted pickles, what a run leaves."""

import json
import os
import pickle
import sys
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file

LEFT = {"config.yaml", "rows.jsonl", "result.json", "adapter.safetensors"}
SMALL = (
    "model=tiny_gpt2 dataset=local dataset.test_size=8 tracking=none precision=fp32 threads=1 "
    "batch=4 epochs=2"
).split()


class Plant:
    """A pickle of it makes the folder `path` when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def planted_pickle(path):
    return pickle.dumps(Plant(path))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def numbers(folder):
    """All that a run has computed, to the bit: its rows, its result without times, its adapter."""
    result = json.loads((folder / "result.json").read_text())
    for key in ("cost", "provenance", "trial", "study"):
        del result[key]
    for epoch in result["epochs"]:
        del epoch["seconds"]
    tensors = load_file(folder / "adapter.safetensors")
    kept = {name: (t.dtype, tuple(t.shape), t.numpy().tobytes()) for name, t in tensors.items()}
    return (folder / "rows.jsonl").read_text(), result, kept


def unfinished(folder):
    """What is left of files and folders that were being written, however deep."""
    return [path for path in Path(folder).rglob(".*") if path.suffix != ".lock"]


def one_line(captured, *parts):
    """Assert that standard error is one line of ours that holds `parts`; return it."""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("peftlab: "), captured.err
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


def last_line(captured, *parts):
    """Assert that standard error ends in one line of ours, without a traceback; return it."""
    assert "Traceback" not in captured.err, captured.err
    line = captured.err.splitlines()[-1]
    assert line.startswith("peftlab: "), captured.err
    for part in parts:
        assert part in line, line
    return line


@contextmanager
def quiet():
    """Hide what this process and its children write to stdout and stderr, at the descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(n) for n in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for n in (1, 2):
            os.dup2(nowhere, n)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for n, fd in zip((1, 2), kept, strict=True):
            os.dup2(fd, n)
            os.close(fd)
        os.close(nowhere)

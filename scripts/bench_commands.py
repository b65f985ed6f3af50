"""Measure whole commands of peftlab, for bench.py: seconds from the start, and final losses."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PEFTLAB = [sys.executable, "-m", "peftlab"]
SMALL = ["method=lora", "tracking=none", "dataset=bfcl", "dataset.test_size=4", "epochs=1"]
BEGINS = "test before training"  # the last line before the first step
COLD = "compile=true, 24 rows, graphs not in the cache"
PRECISIONS = ("fp32", "bf16")


def starts(rounds: int) -> dict[str, Any]:
    """Measure seconds from the start of the process, each command in turn."""
    train = [*PEFTLAB, "train", *SMALL]
    peer = {"stack": "peft", "method": "lora", "precision": "fp32", "threads": os.cpu_count()}
    bench = str(Path(__file__).with_name("bench.py"))
    begins = {BEGINS: "step 1 begins"}
    compiles = [*train, "dataset.train_size=24", "compile=true"]
    second = begins | {"step 2/": "step 2, the first compiled, ends"}
    commands: dict[str, tuple[list[str], dict[str, str]]] = {
        "peftlab --help": ([*PEFTLAB, "--help"], {}),
        "peftlab train --cfg job": ([*PEFTLAB, "train", "--cfg", "job"], {}),
        "HF peft, plain loop, fp32, 8 x 128 tokens": (
            [sys.executable, bench, "contend", json.dumps(peer)],
            {'{"first"': "step 1 ends"},
        ),
        "peftlab train, 8 rows of bfcl, warm": (
            [*train, "dataset.train_size=8"],
            begins | {"step 1/": "step 1 ends"},
        ),
        "compile=true, 24 rows, graphs in the cache": (compiles, second),
        COLD: (compiles, second),
    }
    found: dict[str, dict[str, list[float]]] = {label: {} for label in commands}
    for turn in range(rounds + 1):  # the first fills the caches, and does not count
        for label, (command, lines) in commands.items():
            for what, seconds in _seconds(command, lines, cold=label == COLD).items():
                if turn:
                    found[label].setdefault(what, []).append(seconds)
    print("\n## From the start of the process\n")
    print("| command | until | s | spread |\n| --- | --- | ---: | ---: |")
    for label, times in found.items():
        for what, seconds in times.items():
            spread = f"{min(seconds):.2f}..{max(seconds):.2f}"
            print(f"| {label} | {what} | {statistics.median(seconds):.2f} | {spread} |")
    return {"starts": found}


def _seconds(command: list[str], lines: Mapping[str, str], *, cold: bool) -> dict[str, float]:
    """Return the seconds until a line begins with each key of `lines`; without any, until the end.

    They go by the names that are its values. cold: without compiled graphs of earlier runs.
    """
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("GOMP_SPINCOUNT", None)  # as in bench.py: each stack as its user has it
        if cold:
            environment["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/graphs"
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=environment,
        )
        assert process.stdout is not None
        written = []
        for line in process.stdout:
            written.append(line)
            for text, what in lines.items():
                if line.startswith(text):
                    times.setdefault(what, time.perf_counter() - started)
        if process.wait() != 0 or len(times) != len(lines):
            sys.exit(f"{' '.join(command)}\n{''.join(written)}")
        return times if lines else {"the end": time.perf_counter() - started}


def losses(rounds: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Measure the final losses of the default job, changed by `overrides`, in each precision."""
    found: dict[str, list[dict[str, float]]] = {precision: [] for precision in PRECISIONS}
    print(f"\n## `peftlab train {' '.join(overrides)}` in float32 and in bf16\n")
    print(
        "| round | precision | train bits per token | test bits per token | minutes of training |"
    )
    print("| ---: | --- | ---: | ---: | ---: |")
    for turn in range(rounds):
        for precision in PRECISIONS:
            result = _train([*overrides, f"precision={precision}", f"seed={42 + turn}"])
            final = {s: result["final"][f"{s}_bits_per_token"] for s in ("train", "test")}
            found[precision].append(final)
            bits = " | ".join(f"{value:.4f}" for value in final.values())
            minutes = result["cost"]["train_seconds"] / 60
            print(f"| {turn + 1} | {precision} | {bits} | {minutes:.1f} |", flush=True)
    for split in ("train", "test"):
        pairs = zip(*(found[precision] for precision in PRECISIONS), strict=True)
        gap = max(abs(a[split] - b[split]) for a, b in pairs)
        print(f"\n{split}: at most {gap:.4f} bits per token apart")
    return {"losses": found}


def _train(overrides: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [*PEFTLAB, "train", *overrides, "tracking=none", f"hydra.run.dir={folder}/run"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return json.loads((Path(folder) / "run" / "result.json").read_text())

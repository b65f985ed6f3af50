"""A long study of short trials in one process: what it holds, and what a trial takes.

python scripts/soak.py --trials 500        exit code 1 if something grows

Time is that of the processor, of all threads: what runs beside it counts less.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_sweeps import MEMORY, Watch, quiet, tune

WARM = 20  # trials in which caches fill, and the sweep's list of the last 16 results
MOST = {"MiB": 0.1, "objects": 20.0}  # that a trial may add on average, of a long soak
SLOWER = 1.25  # the last trials may take so many times what the first did
PARTS = 5  # of the trials after WARM: the first and the last are compared


class Timed(Watch):
    """Watch that tells the CPU seconds as well."""

    def on_job_end(self, config: Any, job_return: Any, **more: Any) -> None:
        """Write what the process holds, and what it has computed until then."""
        super().on_job_end(config, job_return, **more)
        with Path(f"{self.path}-times").open("a") as file:
            file.write(f"{time.process_time()}\n")


def soak(folder: Path, n_trials: int) -> list[dict[str, float]]:
    """Run the study; return for each trial what its process held then, and its seconds."""
    path = folder / "held"
    callback = "hydra.callbacks.watch"
    words = ["tracking=none", "study=soak", f"hydra.sweeper.n_trials={n_trials}"]
    words += [f"+{callback}._target_=soak.Timed", f"+{callback}.path={path}"]
    quiet(folder, tune([*MEMORY, *words]))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    times = [0.0, *map(float, Path(f"{path}-times").read_text().split())]
    for row, before, after in zip(rows, times[:-1], times[1:], strict=True):
        row["CPU seconds"] = after - before
    return rows


def grown(
    rows: Sequence[dict[str, float]],
    warm: int = WARM,
    most: dict[str, float] = MOST,
    slower: float = SLOWER,
) -> list[str]:
    """Return what has grown, one line each: nothing, if the process could go on for ever."""
    size = max(1, (len(rows) - warm) // PARTS)
    first, last = rows[warm : warm + size], rows[-size:]

    def middle(part: Sequence[dict[str, float]], what: str) -> float:
        return statistics.median(row[what] for row in part)

    n = len(rows) - warm - size  # trials between the two parts
    lines = []
    for what in ("open files", "threads"):
        if middle(last, what) > middle(first, what):
            lines.append(f"{what}: {middle(first, what):g}, at the end {middle(last, what):g}")
    for what, limit in most.items():
        rate = (middle(last, what) - middle(first, what)) / n
        if rate > limit:
            lines.append(f"{what}: {rate:.3g} more with each trial")
    if middle(last, "CPU seconds") > slower * middle(first, "CPU seconds"):
        times = (
            f"{middle(first, 'CPU seconds'):.2f} s, at the end {middle(last, 'CPU seconds'):.2f} s"
        )
        lines.append(f"a trial takes {times} of CPU time")
    return lines


def main() -> int:
    """Print what was held on the way; return 1 if something has grown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=500)
    n_trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as name:
        rows = soak(Path(name), n_trials)
    marks = [n for n in (1, 10, 20, 50, 100, 200, 300, 400, 500) if n <= n_trials]
    print("|  |", " | ".join(f"trial {n}" for n in marks), "|")
    print("| --- |", " | ".join(["---:"] * len(marks)), "|")
    for what in rows[0]:
        digits = 2 if what == "CPU seconds" else 0
        cells = [f"{rows[mark - 1][what]:,.{digits}f}" for mark in marks]
        print(f"| {what} |", " | ".join(cells), "|")
    lines = grown(rows)
    print("\n".join(lines) or "flat")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())

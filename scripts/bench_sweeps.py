"""Measure sweeps for docs/sweeps.md; each part prints a table.

    python scripts/bench_sweeps.py uneven      two workers, beside the stock plugin: 5 minutes
    python scripts/bench_sweeps.py pruning     studies with and without a pruner: 15 minutes
    python scripts/bench_sweeps.py memory      200 trials in one process, twice: 8 minutes

The stock plugin gets an environment of its own, by pip; --stock-python names one that has it.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.experimental.callback import Callback

TINY = ["model=tiny_gpt2", "dataset=cmudict", "precision=fp32", "threads=1"]


def main() -> int:
    """Print the table of one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=["uneven", "pruning", "memory"])
    parser.add_argument("--stock-python", type=Path, help="interpreter with the stock plugin")
    parser.add_argument("--trials", type=int, default=200, help="of the part memory")
    known = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        match known.part:
            case "uneven":
                uneven(folder, known.stock_python or install_stock(folder / "stock"))
            case "pruning":
                pruning(folder)
            case _:
                memory(folder, known.trials)
    return 0


# Uneven trials ------------------------------------------------------------------------------

STOCK = ["hydra-optuna-sweeper==1.3.0", "optuna==2.10.1", "hydra-joblib-launcher==1.2.0"]
N_UNEVEN = 20
DRAW = random.Random(0)
SECONDS = [8 ** DRAW.random() for _ in range(N_UNEVEN)]  # 1 to 8, even on a log scale
APP = f"""
import time

import hydra
from hydra.core.hydra_config import HydraConfig

SECONDS = {SECONDS}


def task(config):
    time.sleep(SECONDS[HydraConfig.get().job.num])
    return (config.x - 2) ** 2


if __name__ == "__main__":
    hydra.main(version_base="1.3", config_path=".", config_name="app")(task)()
"""
COMMON = ["-m", "x=interval(-5,5)", f"hydra.sweeper.n_trials={N_UNEVEN}", "hydra.sweeper.n_jobs=2"]
SWEEPERS = {
    "stock": ["hydra/sweeper=optuna", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "peftlab": ["hydra/sweeper=peftlab", "hydra/launcher=peftlab_workers"],
}


def install_stock(folder: Path) -> Path:
    """Make an environment with the stock plugin as its users get it; return its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *STOCK], check=True)
    return python


def uneven(folder: Path, stock_python: Path) -> None:
    """Time the same trials under both sweepers, in turn."""
    (folder / "app.py").write_text(APP)
    (folder / "app.yaml").write_text("x: 0.0\n")
    pythons = {"stock": stock_python, "peftlab": Path(sys.executable)}
    batches = zip(SECONDS[::2], SECONDS[1::2], strict=True)
    print(f"{N_UNEVEN} trials of {min(SECONDS):.1f} to {max(SECONDS):.1f} s on two workers.")
    print(f"Half of their sum: {sum(SECONDS) / 2:.1f} s;", end=" ")
    print(f"the slower of each pair: {sum(map(max, batches)):.1f} s.\n")
    print("| run | stock, s | peftlab, s | peftlab / stock |\n| --- | ---: | ---: | ---: |")
    for run in (1, 2):
        seconds = {}
        for name, words in SWEEPERS.items():
            command = [str(pythons[name]), "app.py", *COMMON, *words]
            started = time.perf_counter()
            quiet(folder, [*command, f"hydra.sweep.dir={name}{run}"])
            seconds[name] = time.perf_counter() - started
        stock, ours = seconds["stock"], seconds["peftlab"]
        print(f"| {run} | {stock:.1f} | {ours:.1f} | {ours / stock:.2f} |", flush=True)


# Pruning ------------------------------------------------------------------------------------

PRUNERS = ("none", "median", "asha")
SEEDS = (0, 1, 2)
N_PRUNING = 24
PRUNING = [
    *TINY,
    "method=lora",
    "optimizer.lr=tag(log,interval(1e-5,1e-1))",
    "method.rank=choice(1,2,4,8)",
    "dataset.train_size=160",
    "dataset.test_size=8",
    "epochs=2",
    "tracking=none",
    f"hydra.sweeper.n_trials={N_PRUNING}",
]


def pruning(folder: Path) -> None:
    """Tune with each pruner; count the tokens that all trials of a study were trained on."""
    print("| sampler seed | pruner | pruned | best train bits per token | tokens | of none |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for seed in SEEDS:
        full = 0
        for pruner in PRUNERS:
            name = f"{pruner}{seed}"
            more = [f"hydra/sweeper/pruner={pruner}", f"hydra.sweeper.seed={seed}", f"study={name}"]
            quiet(folder, tune([*PRUNING, *more]))
            study = folder / "outputs" / name
            results = yaml.safe_load((study / "optimization_results.yaml").read_text())
            tokens = sum(map(tokens_of, study.glob("*/rows.jsonl")))
            full = tokens if pruner == "none" else full
            n_pruned, best = results["n_trials"]["pruned"], results["best_value"]
            cells = [seed, pruner, n_pruned, f"{best:.4f}", f"{tokens:,}", f"{tokens / full:.2f}"]
            print("|", " | ".join(map(str, cells)), "|", flush=True)


def tokens_of(rows: Path) -> int:
    """Return how many tokens a run was trained on."""
    return max(json.loads(line)["tokens"] for line in rows.read_text().splitlines())


# Memory -------------------------------------------------------------------------------------

MEMORY = [
    *TINY,
    "method=lora",
    "dataset.train_size=8",
    "dataset.test_size=8",
    "batch=8",
    "epochs=1",
]
HELD = ("MiB", "open files", "threads", "objects")


class Watch(Callback):
    """After each job, what its process holds goes into a line of the file `path`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_job_end(self, config: Any, job_return: Any, **more: Any) -> None:
        """Write the resident set in MiB, open files, threads, and objects of Python."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        counts = [len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task")]
        gc.collect()
        held = [pages * os.sysconf("SC_PAGE_SIZE") / 2**20, *counts, len(gc.get_objects())]
        with Path(self.path).open("a") as file:
            file.write(json.dumps(dict(zip(HELD, held, strict=True))) + "\n")


def watched(folder: Path, overrides: Sequence[str]) -> list[dict[str, float]]:
    """Run a study in one process; return what it held after each trial."""
    path = folder / f"watch-{len(list(folder.glob('watch-*')))}"
    callback = ["+hydra.callbacks.watch._target_=bench_sweeps.Watch"]
    quiet(folder, tune([*MEMORY, *overrides, *callback, f"+hydra.callbacks.watch.path={path}"]))
    return [json.loads(line) for line in path.read_text().splitlines()]


def memory(folder: Path, n_trials: int) -> None:
    """Print what the process holds on the way, with and without W&B."""
    marks = [n for n in (1, 10, 20, 50, 100, 150, 200) if n <= n_trials]
    print("| tracking |  |", " | ".join(f"trial {n}" for n in marks), "|")
    print("| --- | --- |", " | ".join(["---:"] * len(marks)), "|")
    for tracking in ("none", "wandb"):
        offline = ["tracking.mode=offline"] if tracking == "wandb" else []
        words = [f"tracking={tracking}", *offline, f"study={tracking}"]
        rows = watched(folder, [*words, f"hydra.sweeper.n_trials={n_trials}"])
        for what in HELD:
            cells = [f"{rows[mark - 1][what]:,.0f}" for mark in marks]
            print(f"| {tracking} | {what} |", " | ".join(cells), "|", flush=True)


def tune(overrides: Sequence[str]) -> list[str]:
    """Return the command of a study."""
    return [sys.executable, "-m", "peftlab", "train", "-m", "+sweeps=tune", *overrides]


def quiet(folder: Path, command: Sequence[str]) -> None:
    """Run a command in `folder`; its output is shown only if it fails."""
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    sys.exit(main())

"""A toy task of a few microseconds, and sweeps over it through the real Hydra."""

import os
import signal
import sys
import time
from pathlib import Path

import hydra
import optuna
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton

from peftlab.errors import InputError
from peftlab.storage import open_storage
from peftlab.trial import Pruned, current_trial

HERE = Path(__file__).parent


def value_of(c):
    """Least, 0, at x = 2, k = 3; each seed adds its own number."""
    return (c.x - 2) ** 2 + abs(c.k - 3) + 0.1 * c.seed


def task(c):
    number = HydraConfig.get().job.num
    if c.log:  # which job ran, in which order
        with Path(c.log).open("a") as file:
            file.write(f"{number} x={c.x} k={c.k} letter={c.letter} seed={c.seed}\n")
    trial = current_trial()
    if c.what == "together":  # the good trial and the bad one start at once, the bad one is slower
        Path(f"{c.log}.{number}").touch()
        while not all(Path(f"{c.log}.{n}").exists() for n in (0, 1)):
            time.sleep(0.01)
    for step in range(5, 100, 5):
        trial.report(value_of(c) + 1 / step, step)
        if trial.should_prune():
            raise Pruned
        time.sleep(c.sleep if c.x < 10 else 3 * c.sleep)
    match c.what:
        case "not_finite" if number % 2:
            return float("nan")
        case "error" if number % 2:
            raise RuntimeError(f"odd {number}")
        case "once" if not Path(f"{c.log}.{number}").exists():
            Path(f"{c.log}.{number}").touch()
            raise RuntimeError("the first attempt")
        case "die" if number == 1 and not Path(f"{c.log}.{number}").exists():
            Path(f"{c.log}.{number}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        case "refused":
            raise InputError(f"x={c.x}: above 100")
        case "refused_odd" if number % 2:
            raise InputError(f"x={c.x}: above 100")
        case "word":
            return "foo"
        case "interrupt" if number == 2 and not Path(f"{c.log}.{number}").exists():
            Path(f"{c.log}.{number}").touch()
            os.kill(os.getpid(), signal.SIGINT)
        case "threads":
            return int(os.environ["OMP_NUM_THREADS"])
        case "two":
            return value_of(c), c.x
    return value_of(c)


def words(folder, *overrides):
    return ["-m", "hydra/sweeper=peftlab", f"hydra.sweep.dir={folder}", *overrides]


def sweep(folder, *overrides, task=task):
    """Run a sweep in this process; exceptions come out."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    state = dict(Singleton._instances)
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        sys.argv = ["toy", *words(folder, *overrides)]
        hydra.main(version_base="1.3", config_path=str(HERE), config_name="toy")(task)()
    finally:
        sys.argv = argv
        Singleton._instances = state
        os.environ.pop("HYDRA_FULL_ERROR")
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full


def trials(folder, storage="journal:study.journal", study="study"):
    """All trials in the storage."""
    study = optuna.load_study(study_name=study, storage=open_storage(storage, folder))
    return study.get_trials(deepcopy=False)


def states(folder, study="study"):
    return [trial.state.name for trial in trials(folder, study=study)]


def results(folder):
    return yaml.safe_load((folder / "optimization_results.yaml").read_text())


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = ["toy", *words(sys.argv[1], *sys.argv[2:])]
    hydra.main(version_base="1.3", config_path=str(HERE), config_name="toy")(task)()

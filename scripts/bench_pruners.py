"""Replay studies that ran without a pruner under pruners: what each saves, and what it loses.

    python scripts/bench_pruners.py STUDY.journal [...]

The trials of a study are taken in 20 random orders, two at a time, report by report, as two
workers would run them; a pruner sees what its own study has seen so far. Printed for each pruner,
as means over the orders: the share of the training that it lets run, how often the best trial of
the study is left (to within 0.01 bits), and by how much the best that is left is worse.
"""

import random
import statistics
import sys
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import optuna
from hydra.utils import instantiate
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from hydra_plugins.peftlab_sweeper.conf import PRUNERS

ORDERS, WORKERS = 20, 2
SAME = 0.01  # bits per token
HALVING = "optuna.pruners.SuccessiveHalvingPruner"
OTHERS = {
    f"halving from {least} % by {factor}": {
        "_target_": HALVING,
        "min_resource": least,
        "reduction_factor": factor,
    }
    for least, factor in ((5, 2), (5, 4), (10, 2), (10, 3), (10, 4), (20, 2), (20, 3))
}


class Recorded(NamedTuple):
    """A trial: its value, None if it diverged, and what it reported, by percent of the run."""

    value: float | None
    reports: dict[int, float]


def main() -> int:
    """Print a table for each study, and one over all."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    pruners = {name: PRUNERS[name] for name in ("median", "percentile", "asha")} | OTHERS
    everything: dict[str, list[tuple[float, float, float]]] = {name: [] for name in pruners}
    for path in sys.argv[1:]:
        storage = JournalStorage(JournalFileBackend(path))
        for name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=name, storage=storage)
            trials = [
                Recorded(
                    t.value if t.state == TrialState.COMPLETE else None,
                    dict(sorted(t.intermediate_values.items())),
                )
                for t in study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])
            ]
            found = {key: measure(node, trials) for key, node in pruners.items()}
            for key, figures in found.items():
                everything[key].append(figures)
            show(f"{name}, {len(trials)} trials", found)
    total = {key: means(figures) for key, figures in everything.items()}
    show(f"all {len(next(iter(everything.values())))} studies", total)
    return 0


def measure(pruner: dict, trials: list[Recorded]) -> tuple[float, float, float]:
    """Return share of training, how often the best is left, and bits lost, over all orders."""
    best = min(trial.value for trial in trials if trial.value is not None)
    figures = []
    for seed in range(ORDERS):
        order = trials[:]
        random.Random(seed).shuffle(order)
        spent, left = replay(instantiate(pruner), order)
        lost = left - best
        figures.append((spent, float(lost <= SAME), lost))
    return means(figures)


def replay(pruner: optuna.pruners.BasePruner, order: list[Recorded]) -> tuple[float, float]:
    """Return the share of all training that `pruner` lets run, and the best value left."""
    study = optuna.create_study(pruner=pruner)
    waiting, running, percents, left = iter(order), [], 0, []
    whole = sum(100 if t.value is not None else max(t.reports, default=0) for t in order)
    while True:
        while len(running) < WORKERS and (recorded := next(waiting, None)) is not None:
            running.append((study.ask(), recorded, iter(recorded.reports.items())))
        if not running:
            return percents / whole, min(left, default=float("inf"))
        trial, recorded, reports = running.pop(0)
        step, value = next(reports, (None, None))
        if step is None or value is None:
            if recorded.value is None:
                study.tell(trial, state=TrialState.PRUNED)
                percents += max(recorded.reports, default=0)
            else:
                study.tell(trial, recorded.value)
                percents, left = percents + 100, [*left, recorded.value]
            continue
        trial.report(value, step)
        if trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
            percents += step
        else:
            running.append((trial, recorded, reports))


def means(figures: Iterable[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Return the mean of each column."""
    first, second, third = zip(*figures, strict=True)
    return statistics.fmean(first), statistics.fmean(second), statistics.fmean(third)


def show(title: str, found: dict[str, tuple[float, float, float]]) -> None:
    """Print a table."""
    print(f"\n{title}\n\n| pruner | of the training | best left | bits lost |")
    print("| --- | ---: | ---: | ---: |")
    for name, (spent, left, lost) in found.items():
        print(f"| {name} | {spent:.2f} | {left:.0%} | {lost:.4f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""optimization_results.yaml: Hydra's keys, and what else a study has to say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hydra_plugins.peftlab_sweeper._study import Book
from peftlab.files import to_yaml, write_atomic


def counts(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    """Count the trials by how they ended."""
    diverged = sum(bool(trial.user_attrs.get("diverged")) for trial in trials)
    silent = sum(bool(trial.user_attrs.get("without_value")) for trial in trials)
    number = {state: sum(t.state == state for t in trials) for state in TrialState}
    return {
        "complete": number[TrialState.COMPLETE] + silent,
        "pruned": number[TrialState.PRUNED] - diverged - silent,
        "diverged": diverged,
        "failed": number[TrialState.FAIL],
        "running": number[TrialState.RUNNING],
        "interrupted": number[TrialState.WAITING],
    }


def ranking(book: Book) -> list[FrozenTrial]:
    """Completed trials of a study with one objective, best first."""
    sign = -1.0 if book.study.direction == StudyDirection.MAXIMIZE else 1.0
    return sorted(book.trials(TrialState.COMPLETE), key=lambda t: (sign * t.values[0], t.number))


def confirmed(book: Book) -> dict[int, dict[str, Any]]:
    """Return for each confirmed trial its values on fresh seeds, their mean and spread."""
    found = {}
    for key, values in book.study.user_attrs.items():
        if key.startswith("confirmed/"):
            numbers = list(values.values())
            mean = {"mean": fmean(numbers), "spread": pstdev(numbers), "seeds": dict(values)}
            found[int(key.removeprefix("confirmed/"))] = mean
    return found


def write_results(book: Book, path: Path, *, storage: str, where: str) -> dict[str, Any]:
    """Write and return the results so far. storage: as configured; where: folder of the sweep."""
    study = book.study
    content: dict[str, Any] = {"name": "optuna"}
    if len(study.directions) == 1:
        content |= _best(book, where)
    else:
        content["solutions"] = [
            {
                "params": t.params,
                "values": t.values,
                "trial": t.number,
                "dir": f"{where}/{t.number}",
            }
            for t in study.best_trials
        ]
    content |= {
        "study_name": study.study_name,
        "storage": storage,
        "directions": [direction.name.lower() for direction in study.directions],
        "n_trials": counts(book.trials()),
    }
    write_atomic(path, to_yaml(content))
    return content


def _best(book: Book, where: str) -> dict[str, Any]:
    """Return the best trial: of the confirmed ones if there are any, by their mean there."""
    ranked = ranking(book)
    if not ranked:
        return {"best_params": None, "best_value": None}
    best, value, more = ranked[0], ranked[0].values[0], {}
    if again := confirmed(book):
        order = [trial for trial in ranked if trial.number in again]
        sign = -1.0 if book.study.direction == StudyDirection.MAXIMIZE else 1.0
        best = min(order, key=lambda trial: sign * again[trial.number]["mean"])
        value, more = again[best.number]["mean"], {"confirmed": again}
    if "spread" in best.user_attrs:
        more["best_spread"] = best.user_attrs["spread"][0]
    return {
        "best_params": best.params,
        "best_value": value,
        "best_trial": best.number,
        "best_dir": f"{where}/{best.number}",
        **more,
    }

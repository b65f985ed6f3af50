"""Studies: their trials as parallel coordinates, and which parameters mattered (PED-ANOVA)."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftlab.report.boards import Board, Contender, Setting

LEAST_TRIALS = 10  # completed ones: with fewer, an importance says nothing
# method.lr is where optimizer.lr comes from unless that is set, as in every study
NOT_PARAMETERS = ("seed", "study", "threads", "output", "skip_finished", "objective", "method.lr")
LOG_RATIO = 30  # a parameter whose largest value is so many times its smallest is drawn on a log


@dataclass(frozen=True)
class Parameter:
    """One thing that a study varied."""

    name: str
    values: list[Any]  # per trial
    scale: str  # linear, log or category


@dataclass(frozen=True)
class Study:
    """The trials of a sweep folder that belong to one board."""

    folder: str
    trials: list[tuple[Contender, Setting]]
    parameters: list[Parameter]

    @property
    def losses(self) -> list[float | None]:
        """Train bits per token of each trial; None if it did not complete."""
        return [setting.tuned_to for _, setting in self.trials]


def studies_of(board: Board) -> list[Study]:
    """Return the sweeps of a board that tried at least two settings and varied something."""
    folders: dict[str, list[tuple[Contender, Setting]]] = defaultdict(list)
    for contender in board.contenders:
        for setting in contender.settings:
            for name in {record.sweep for record in setting.records if record.sweep}:
                folders[name].append((contender, setting))
    studies = []
    for folder, trials in sorted(folders.items()):
        parameters = _varied(trials)
        if len(trials) > 1 and parameters:
            studies.append(Study(folder, trials, parameters))
    return studies


def _varied(trials: Sequence[tuple[Contender, Setting]]) -> list[Parameter]:
    """Return what differs between trials; of parameters that are always equal, one."""
    configs = [setting.records[0].config for _, setting in trials]
    columns: dict[str, list[Any]] = {"method": [contender.label for contender, _ in trials]}
    shared = set.intersection(*(set(config) for config in configs))
    searched = [key for key in configs[0] if f"method.search.{key}" in configs[0]]
    setting = [key for key in configs[0] if key in shared and not key.startswith("method.search")]
    for key in dict.fromkeys([*searched, *setting]):
        if key in shared and not key.endswith("_target_") and key not in NOT_PARAMETERS:
            columns[key] = [config[key] for config in configs]
    found: list[Parameter] = []
    for name, values in columns.items():
        differ = len({repr(value) for value in values}) > 1
        if differ and values not in [other.values for other in found]:  # one may follow another
            found.append(Parameter(name, values, _scale(values)))
    return found


def _scale(values: Sequence[Any]) -> str:
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return "category"
    return "log" if min(values) > 0 and max(values) / min(values) >= LOG_RATIO else "linear"


def importances(study: Study) -> dict[str, float] | None:
    """Return each parameter's share of what decides whether a trial is among the best tenth.

    PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255) in Optuna's implementation, on the study
    rebuilt from its records. None with fewer than LEAST_TRIALS completed trials.
    """
    losses = study.losses
    done = [n for n, loss in enumerate(losses) if loss is not None]
    if len(done) < LEAST_TRIALS:
        return None
    import optuna  # 0.4 s: only where a study is large enough

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        rebuilt = optuna.create_study(direction="minimize")
        spaces = {p.name: _distribution(p) for p in study.parameters}
        for n in done:
            rebuilt.add_trial(
                optuna.trial.create_trial(
                    params={p.name: _value(p, n) for p in study.parameters},
                    distributions=spaces,
                    value=losses[n],
                )
            )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(rebuilt, evaluator=evaluator)
    return {name: share for name, share in found.items() if math.isfinite(share)}


def _distribution(parameter: Parameter) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if parameter.scale == "category":
        return CategoricalDistribution(sorted({str(v) for v in parameter.values}))
    log = parameter.scale == "log"
    whole = all(isinstance(v, int) for v in parameter.values)
    kind = IntDistribution if whole else FloatDistribution
    return kind(min(parameter.values), max(parameter.values), log=log)


def _value(parameter: Parameter, n: int) -> Any:
    value = parameter.values[n]
    return str(value) if parameter.scale == "category" else value

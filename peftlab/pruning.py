"""Which running trial is not worth finishing, judged against all others, running ones included.

Steps are percent of a run (see `peftlab.trial`), so every default below holds for any length.
"""

import math

import numpy as np
from optuna.pruners import BasePruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from peftlab.config import number
from peftlab.errors import require


class Percentile(BasePruner):
    """Prune a trial that is worse than a percentile of all trials that have reached its step.

    Optuna's median pruners compare with finished trials only, so that trials side by side never
    prune each other. Here every other trial counts with its own value at this very step: running,
    pruned and finished alike. Compared is the trial's best value so far, as Optuna does.

    percentile: of the others' values, above 0 and below 100; 50 = median, 25 keeps the best
    quarter. n_startup: other trials that must have reached the step, from 1. n_warmup: percent of
    the run below which nothing is pruned.
    """

    def __init__(self, *, percentile: float, n_startup: int, n_warmup: int) -> None:
        values = {"percentile": percentile, "n_startup": n_startup, "n_warmup": n_warmup}
        where = {f"hydra.sweeper.pruner.{key}": value for key, value in values.items()}
        number(where, "hydra.sweeper.pruner.percentile", above=0, below=100)
        number(where, "hydra.sweeper.pruner.n_startup", least=1)
        number(where, "hydra.sweeper.pruner.n_warmup", least=0, below=100)
        self.percentile, self.n_startup, self.n_warmup = percentile, n_startup, n_warmup

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether `trial` is to end at its last reported step."""
        step = trial.last_step
        if step is None or step < self.n_warmup:
            return False
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        others = [
            _rank(other.intermediate_values[step], sign)
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number
            and other.state != TrialState.FAIL
            and step in other.intermediate_values
        ]
        if len(others) < self.n_startup:
            return False
        best = min(_rank(value, sign) for value in trial.intermediate_values.values())
        return best > np.percentile(others, self.percentile, method="lower")


def _rank(value: float, sign: float) -> float:
    """Smaller is better; what is not a number is worst."""
    return math.inf if math.isnan(value) else sign * value


def check_pruner(pruner: BasePruner, n_directions: int) -> None:
    """Raise InputError where a study has several objectives: pruning needs a single one."""
    from optuna.pruners import NopPruner

    single = n_directions == 1 or isinstance(pruner, NopPruner)
    require(single, "hydra/sweeper/pruner", type(pruner).__name__, "none with several objectives")

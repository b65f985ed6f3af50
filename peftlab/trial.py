"""What a job sees of its trial: it reports on the way, and may be told that it is not worth it.

A step of a trial is a percentage of the run: 20 reports between its start and its end, whatever
the number of optimizer steps, so that pruners have one scale. The end itself is never reported:
a trial that is finished cannot be pruned any more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

REPORTS = 20  # per run
VARIABLE = "PEFTLAB_TRIAL"  # number of the trial that this job's process reports to


class Pruned(Exception):
    """The job ended early because its trial was not worth finishing: not a failure."""


class Interrupted(Exception):
    """The job was asked to stop, and can go on later as the same trial."""


class Trial(Protocol):
    """The trial that a job belongs to."""

    def report(self, value: float, step: int) -> None:
        """Tell the objective's value so far; step: percent of the run."""
        ...

    def should_prune(self) -> bool:
        """Whether the job is to stop now, judged by what was last reported."""
        ...


class NullTrial:
    """Outside of a study nobody listens."""

    def report(self, value: float, step: int) -> None:
        """Do nothing."""

    def should_prune(self) -> bool:
        """Never."""
        return False


class StudyTrial:
    """A trial of a study in a storage that this process shares with the sweeper.

    settings: hydra.sweeper. folder: where the sweep was started.
    """

    def __init__(self, settings: DictConfig, number: int, folder: Path) -> None:
        import optuna

        from peftlab.storage import open_storage

        self.study = optuna.load_study(
            study_name=study_name(settings),
            storage=open_storage(settings.storage, folder, wait=True),  # the sweeper had it open
            sampler=optuna.samplers.RandomSampler(),  # jobs never sample
            pruner=instantiate(settings.pruner),
        )
        self.storage = self.study._storage
        self.id = self.storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)
        self.owner = self.storage.get_trial(self.id).user_attrs.get("owner")  # a sweeper

    def report(self, value: float, step: int) -> None:
        """Store the value; what an earlier attempt reported at this step is replaced."""
        self.storage.set_trial_intermediate_value(self.id, step, value)

    def should_prune(self) -> bool:
        """Ask the study's pruner. Raises: Interrupted if the trial is this job's no longer.

        On a cluster a job outlives its sweeper: another one may have taken the trial over, in a
        job that waits for this one's folder.
        """
        trial = self.storage.get_trial(self.id)
        if trial.state.name != "RUNNING" or trial.user_attrs.get("owner") != self.owner:
            raise Interrupted("the sweeper has given this trial up, or another has taken it over")
        return self.study.pruner.prune(self.study, trial)


def study_name(settings: DictConfig) -> str:
    """Return the name of the study in its storage. settings: hydra.sweeper."""
    return settings.study_name or "study"


def current_trial() -> Trial:
    """Return the trial of the job that runs in this process."""
    number = os.environ.get(VARIABLE)
    if number is None or not HydraConfig.initialized():
        return NullTrial()
    hydra = HydraConfig.get()
    return StudyTrial(hydra.sweeper, int(number), Path(hydra.runtime.cwd))


def due(step: int, total: int) -> int | None:
    """Return the percent to report after optimizer step `step` of `total`, or None: not now."""
    reached, before = (at * REPORTS // total for at in (step, step - 1))
    return reached * 100 // REPORTS if reached > before and step < total else None


@dataclass(frozen=True)
class PrunedReturn:
    """What a pruned job returns to Hydra, which would report an exception as a failure."""


@dataclass(frozen=True)
class Task:
    """The user's task function; a pruned job returns instead of raising."""

    function: Callable[[DictConfig], Any]

    def __call__(self, config: DictConfig) -> Any:
        """Run the task."""
        try:
            return self.function(config)
        except Pruned:
            return PrunedReturn()

"""Where the next trial goes: a pure function of the study's history and the seed.

Each point is drawn in a copy of the study in memory, with a sampler seeded by the trial's number.
So a study that was killed goes on exactly as if it had not been, a point is never tried twice,
and a trial enters the storage whole, in one record.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from hydra_plugins.peftlab_sweeper._space import Point, Space, identity
from hydra_plugins.peftlab_sweeper._widen import widened
from peftlab.errors import InputError

ATTEMPTS = 20  # draws by the sampler until a point is new, then as many at random


class Grid(RandomSampler):
    """Marks that all points are taken in order; it is never asked to draw."""


@dataclass
class Suggestion:
    """A point, and what the sampler wants to remember with it."""

    point: Point
    distributions: Mapping[str, BaseDistribution]  # that it was drawn from
    enqueued: str | None = None  # identity of the entry of `enqueue` that it comes from
    trial_attrs: Mapping[str, Any] = field(default_factory=dict)
    study_attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Suggester:
    """Suggests points of a space.

    Raises: InputError for a sampler that refuses its settings or this space.
    """

    space: Space
    sampler: DictConfig  # hydra.sweeper.sampler
    pruner: BasePruner  # some samplers look at it
    seed: int | None
    enqueue: Sequence[Point]
    directions: Sequence[StudyDirection]
    widen: Mapping[str, float] = field(default_factory=dict)  # hydra.sweeper.widen
    # Trials that failed in an earlier session, by no fault of their point: a disk was full, say.
    # What was asked for by name, in a grid or enqueued, is tried again.
    again: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self.in_order = isinstance(self._sampler(0, 0), Grid)
        if self.in_order:
            for parameter in self.space.parameters:
                parameter.values()

    def next(self, study: Study) -> Suggestion | None:
        """Return the next point that no trial of `study` has had, or None if there is none left."""
        with warnings.catch_warnings():  # Optuna says of some samplers that they are experimental
            warnings.simplefilter("ignore", ExperimentalWarning)
            return self._next(study)

    def _next(self, study: Study) -> Suggestion | None:
        trials = study.get_trials(deepcopy=False)
        space = widened(self.space, trials, self.directions[0], self.widen)
        counted = [trial for trial in trials if trial.number not in self.again]
        tried = {identity(trial.params) for trial in counted}
        attempted = {trial.user_attrs.get("enqueued") for trial in counted}
        for entry in self.enqueue:
            if identity(entry) not in attempted:
                whole = self.space.contains(entry)
                if whole and identity(entry) not in tried:
                    return Suggestion(dict(entry), space.distributions(entry), identity(entry))
                if not whole:
                    return self._draw(space, study, trials, set(), entry)
        if self.in_order:
            left = (p for p in self.space.grid() if identity(p) not in tried)
            point = next(left, None)
            return None if point is None else Suggestion(point, space.distributions(point))
        known = {identity(trial.params) for trial in trials}
        return self._draw(space, study, trials, known, None)

    def _draw(
        self,
        space: Space,
        study: Study,
        trials: Sequence[FrozenTrial],
        tried: set[str],
        entry: Point | None,
    ) -> Suggestion | None:
        memory = self._copy(space, study, trials)
        for attempt in range(2 * ATTEMPTS):
            memory.sampler = self._sampler(len(trials), attempt)
            if attempt >= ATTEMPTS:  # the sampler insists on points that are known
                memory.sampler = self._random(len(trials), attempt)
            if entry is not None:
                memory.enqueue_trial(entry)
            trial = memory.ask()
            point = space.draw(trial)
            if identity(point) not in tried:
                drawn = memory._storage.get_trial(trial._trial_id)
                return Suggestion(
                    point,
                    space.distributions(point),
                    None if entry is None else identity(entry),
                    {k: v for k, v in drawn.system_attrs.items() if k != "fixed_params"},
                    _attrs_of(memory),
                )
            memory.tell(trial, state=TrialState.FAIL)
        return None

    def _copy(self, space: Space, study: Study, trials: Sequence[FrozenTrial]) -> Study:
        """Copy the study into memory; a trial that diverged counts as the worst so far there."""
        memory = optuna.create_study(
            study_name=study.study_name, directions=self.directions, pruner=self.pruner
        )
        for key, value in _attrs_of(study).items():
            memory._storage.set_study_system_attr(memory._study_id, key, value)
        worst = _worst(trials, self.directions)
        for trial in trials:
            state, values = trial.state, trial.values
            if trial.user_attrs.get("diverged") and worst is not None:
                state, values = TrialState.COMPLETE, worst
            point = trial.params if space.contains(trial.params) else {}  # range was narrowed
            memory.add_trial(
                create_trial(
                    state=state if point else TrialState.FAIL,
                    values=values if point else None,
                    params=point,
                    distributions=space.distributions(point),
                    system_attrs=trial.system_attrs,
                    intermediate_values=trial.intermediate_values,
                )
            )
        return memory

    def _sampler(self, number: int, attempt: int) -> BaseSampler:
        name = self.sampler["_target_"]
        more: dict[str, Any] = {"seed": self._seed(number, attempt)}
        if name.endswith(".QMCSampler"):  # one sequence for all trials
            more = {"seed": self.seed, "independent_sampler": self._random(number, attempt)}
        # A copy: Hydra 1.4 takes the whole config apart for a moment, while launchers read it.
        settings = OmegaConf.to_container(self.sampler, resolve=True)
        try:
            sampler = instantiate(settings, _partial_=True, _convert_="all")(**more)
        except (InstantiationException, ImportError, TypeError, ValueError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise InputError(f"hydra.sweeper.sampler={name}: {reason}") from error
        if not isinstance(sampler, BaseSampler):
            raise InputError(f"hydra.sweeper.sampler={name}: must be a sampler of Optuna")
        return sampler

    def _random(self, number: int, attempt: int) -> RandomSampler:
        return RandomSampler(seed=self._seed(number, attempt))

    def _seed(self, number: int, attempt: int) -> int | None:
        """Seed each draw by itself: a plain seed would replay its stream when a study goes on."""
        if self.seed is None:
            return None
        digest = hashlib.sha256(f"{self.seed}/{number}/{attempt}".encode()).digest()
        return int.from_bytes(digest[:4], "big")


def _attrs_of(study: Study) -> dict[str, Any]:
    return study._storage.get_study_system_attrs(study._study_id)


def _worst(
    trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]
) -> list[float] | None:
    values = [trial.values for trial in trials if trial.state == TrialState.COMPLETE]
    if not values:
        return None
    pick = {StudyDirection.MINIMIZE: max, StudyDirection.MAXIMIZE: min}
    return [
        pick[d](column) for d, column in zip(directions, zip(*values, strict=True), strict=True)
    ]

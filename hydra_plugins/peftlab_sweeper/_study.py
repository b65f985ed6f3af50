"""A study in its storage: what is there, what a sweeper claims, how a trial ends.

States, in Optuna's words: WAITING = interrupted, goes on as the same trial in the same folder;
RUNNING = owned by a living sweeper; COMPLETE; PRUNED, which a diverged trial is too (with the
attribute `diverged`), and in a grid a job that returned nothing (`without_value`); FAIL.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from hydra_plugins.peftlab_sweeper._samplers import Suggestion
from hydra_plugins.peftlab_sweeper._space import Space
from peftlab.errors import InputError

VERSION = 1  # of what is kept with a study, and of what its trials' parameters mean
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
DIRECTIONS = {"minimize": StudyDirection.MINIMIZE, "maximize": StudyDirection.MAXIMIZE}


class Book:
    """The sweeper's hold on a study. Use as a context manager: inside, its trials are its own."""

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        directions: Sequence[StudyDirection],
        folder: Path,
    ) -> None:
        """folder: of the sweep; its hidden folder `.sweepers` tells which sweepers are alive.

        Raises: InputError if the study exists with other directions.
        """
        known = {study.study_name: study for study in optuna.get_all_study_summaries(storage)}
        if name in known and known[name].directions != list(directions):
            found = ", ".join(d.name.lower() for d in known[name].directions)
            given = ", ".join(d.name.lower() for d in directions)
            raise InputError(f"hydra.sweeper.direction={given}: the study {name} has {found}")
        self.study: Study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=list(directions),
            sampler=optuna.samplers.RandomSampler(),  # _samplers.py draws, in memory
            load_if_exists=True,
        )
        self.storage = storage
        self.owner = uuid.uuid4().hex[:12]
        self.alive = folder / ".sweepers"
        self.alive.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.alive / self.owner)

    def __enter__(self) -> Book:
        self.lock.acquire()  # the kernel lets go of it when this process dies
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()
        self.lock.release()
        (self.alive / self.owner).unlink(missing_ok=True)

    def leave(self) -> None:
        """Set aside whatever trial of this sweeper has not ended, to go on later."""
        for trial in self.trials(TrialState.RUNNING):
            self.interrupt(trial.number)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in the given states."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def agree(self, space: Space, config: Mapping[str, Any]) -> None:
        """Hold the space and the rest of the config against what the study was made with.

        config: flat, without what may change. Raises: InputError that names the difference.
        """
        now = {"version": VERSION, "space": space.record(), "config": dict(config)}
        before = self.study.user_attrs
        if self.trials() and before.get("version") != VERSION:
            found = f"version {before['version']}" if "version" in before else "another program"
            raise InputError(
                f"hydra.sweeper.study_name={self.study.study_name}: its trials are of {found}, "
                f"this is version {VERSION}; give this study another name"
            )
        if "space" not in before or all(t.state == TrialState.FAIL for t in self.trials()):
            for key, value in now.items():
                self.study.set_user_attr(key, value)
            return
        for key, what in (("space", "searches"), ("config", "has")):
            for name in sorted({*before[key], *now[key]}):
                old, new = (side[key].get(name, "nothing") for side in (before, now))
                if old != new:
                    raise InputError(
                        f"{name}: this sweep {what} {_show(new)}, the study "
                        f"{self.study.study_name} {_show(old)}; give the other study another name"
                    )

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the study against other sweepers while a trial is chosen and entered."""
        with FileLock(self.alive / "turn"):
            yield

    def reclaim(self) -> list[int]:
        """Take over the interrupted trials, and the running ones of sweepers that are dead."""
        with self.turn():
            for trial in self.trials(TrialState.RUNNING):
                if not self._lives(trial.user_attrs.get("owner")):
                    self._set_aside(trial.number)
            return [t.number for t in self.trials(TrialState.WAITING) if self._claim(t.number)]

    def _lives(self, owner: str | None) -> bool:
        if owner is None or not (self.alive / owner).exists():
            return False
        lock = FileLock(self.alive / owner)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        (self.alive / owner).unlink(missing_ok=True)
        return False

    def _claim(self, number: int) -> bool:
        trial = self._id(number)
        if not self.storage.set_trial_state_values(trial, TrialState.RUNNING):
            return False
        self.storage.set_trial_user_attr(trial, "owner", self.owner)
        return True

    def add(self, suggestion: Suggestion) -> int:
        """Enter a new trial, running, in one record; return its number."""
        attrs = {"owner": self.owner}
        if suggestion.enqueued is not None:
            attrs["enqueued"] = suggestion.enqueued
        template = create_trial(
            state=TrialState.RUNNING,
            params=dict(suggestion.point),
            distributions=dict(suggestion.distributions),
            user_attrs=attrs,
            system_attrs=dict(suggestion.trial_attrs),
        )
        trial = self.storage.create_new_trial(self.study._study_id, template_trial=template)
        known = self.storage.get_study_system_attrs(self.study._study_id)
        for key, value in suggestion.study_attrs.items():
            if known.get(key) != value:
                self.storage.set_study_system_attr(self.study._study_id, key, value)
        return self.storage.get_trial_number_from_id(trial)

    def complete(self, number: int, runs: Sequence[Sequence[float]]) -> None:
        """End a trial by its runs' values (one list per seed): their mean counts.

        A value that is not finite means that the trial has diverged.
        """
        trial = self._id(number)
        if not all(math.isfinite(value) for run in runs for value in run):
            self.storage.set_trial_user_attr(trial, "diverged", True)
            self.study.tell(number, state=TrialState.PRUNED)
            return
        columns = list(zip(*runs, strict=True))
        if len(runs) > 1:
            self.storage.set_trial_user_attr(trial, "runs", [list(run) for run in runs])
            self.storage.set_trial_user_attr(trial, "spread", [pstdev(c) for c in columns])
        self.study.tell(number, [fmean(column) for column in columns])

    def prune(self, number: int) -> None:
        """End a trial that was pruned."""
        self.study.tell(number, state=TrialState.PRUNED)

    def finish(self, number: int) -> None:
        """End a trial that has no value; Optuna's COMPLETE would need one."""
        self.storage.set_trial_user_attr(self._id(number), "without_value", True)
        self.study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, reason: str, *, refused: bool) -> None:
        """End a trial that failed for good. refused: its point would fail again, at any time."""
        self.storage.set_trial_user_attr(self._id(number), "error", reason)
        if refused:
            self.storage.set_trial_user_attr(self._id(number), "refused", True)
        self.study.tell(number, state=TrialState.FAIL)

    def interrupt(self, number: int) -> bool:
        """Set a running trial of this sweeper aside, to go on later as the same trial.

        Returns whether it was this sweeper's: another one takes over what seems to be left.
        """
        trial = self.storage.get_trial(self._id(number))
        mine = trial.state == TrialState.RUNNING and trial.user_attrs.get("owner") == self.owner
        if mine:
            self._set_aside(number)
        return mine

    def _set_aside(self, number: int) -> None:
        self.storage.set_trial_state_values(self._id(number), TrialState.WAITING)

    def confirm(self, number: int, seed: int, value: float) -> None:
        """Keep the value of a trial's point on a fresh seed."""
        key = f"confirmed/{number}"
        before = self.study.user_attrs.get(key, {})
        self.study.set_user_attr(key, {**before, str(seed): value})

    def point(self, number: int) -> dict[str, Any]:
        """Return a trial's parameters."""
        return self.storage.get_trial(self._id(number)).params

    def _id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)


def directions_of(setting: object) -> list[StudyDirection]:
    """Read hydra.sweeper.direction. Raises: InputError unless minimize, maximize or a list."""
    words = [setting] if isinstance(setting, str) else setting
    if not isinstance(words, list | tuple) or not words or not set(words) <= set(DIRECTIONS):
        allowed = "minimize or maximize, or a list of them"
        raise InputError(f"hydra.sweeper.direction={setting}: {allowed}")
    return [DIRECTIONS[word] for word in words]


def _show(value: object) -> str:
    return str(value).replace("\n", " ")

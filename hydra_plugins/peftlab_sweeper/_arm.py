"""One study of a sweep: where its next trial goes, what a trial's jobs are, how it ended."""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from optuna.pruners import BasePruner
from optuna.trial import TrialState

from hydra_plugins.peftlab_sweeper._results import confirmed, ranking, write_results
from hydra_plugins.peftlab_sweeper._samplers import Suggester
from hydra_plugins.peftlab_sweeper._space import Point, read_space
from hydra_plugins.peftlab_sweeper._study import FINISHED, Book, directions_of
from hydra_plugins.peftlab_sweeper._widen import check_widen
from peftlab.config import NOT_IDENTITY, at_least, check_name
from peftlab.errors import InputError, require
from peftlab.pruning import check_pruner
from peftlab.storage import open_storage
from peftlab.trial import VARIABLE, Interrupted, PrunedReturn, study_name

RETURNS = 16  # the last ones that a sweep hands to Hydra, which looks at none
Launch = Callable[[list[str], int], Sequence[JobReturn]]  # overrides of a job, its number


class Arm:
    """A study: everything checked when constructed, nothing written before `open`.

    Raises: InputError, or an exception of Hydra's, for whatever does not fit.
    """

    def __init__(
        self, label: str, loader: ConfigLoader, config: DictConfig, arguments: Sequence[str]
    ) -> None:
        """label: of the arm, empty if it is the only one. config: of the whole sweep.

        arguments: the command line's words, then the arm's own, which win.
        """
        self.label, self.loader, self.master = label, loader, config
        parser = OverridesParser.create(config_loader=loader)
        if label:  # what the sweep says of a method is then said of the arm's
            fixed = [w for w in arguments if not parser.parse_override(w).is_sweep_override()]
            config = loader.load_sweep_config(config, fixed)
            OmegaConf.update(config, "hydra.sweeper.arms", None)
        self.config = config
        self.settings = settings = config.hydra.sweeper
        study = OmegaConf.select(config, "study")  # the sweep's folder is named after it
        for part in () if study is None else str(study).split("/"):
            check_name("study", part)
        self.folder = Path(config.hydra.sweep.dir)
        self.cwd = Path(self.master.hydra.runtime.cwd)
        _check(settings)
        ranges = [settings.search, raw(settings, "params"), settings.fixed]
        for word in arguments:
            name = parser.parse_override(word).get_key_element().lstrip("+~")
            where = f"fixed by hydra.sweeper.fixed={plain(settings.fixed)}"
            require(name not in _mapping(settings.fixed), name, word.partition("=")[2], where)
        self.space = read_space(
            arguments, [_mapping(node) for node in ranges], _mapping(settings.when), parser
        )
        self.directions = directions_of(plain(settings.direction))
        pruner = _pruner(settings.pruner)
        check_pruner(pruner, len(self.directions))
        enqueue = [self.space.read_point(entry) for entry in plain(settings.enqueue) or []]
        widen = check_widen(plain(settings.widen), self.space, self.directions)
        self.suggester = Suggester(
            self.space, settings.sampler, pruner, settings.seed, enqueue, self.directions, widen
        )
        self.facts = self._compose()
        self.returns: deque[JobReturn] = deque(maxlen=RETURNS)  # each holds two whole configs
        self.failures: list[Exception] = []
        self.error: Exception | None = None  # why no further trial of this arm is to start

    def open(self, stack: ExitStack) -> None:
        """Open the study until `stack` ends. Raises: InputError for a study that is another."""
        storage = open_storage(self.settings.storage, self.cwd)
        book = Book(storage, study_name(self.settings), self.directions, self.folder)
        self.book = stack.enter_context(book)
        book.agree(self.space, self.facts)
        failed = self.book.trials(TrialState.FAIL)
        self.suggester.again = {t.number for t in failed if not t.user_attrs.get("refused")}

    def close(self) -> dict[str, Any]:
        """Set aside what has not ended; write and return the results."""
        self.book.leave()
        path = self.folder / "optimization_results.yaml"
        storage = raw(self.settings, "storage")
        return write_results(self.book, path, storage=storage, where=str(self.folder))

    @functools.cached_property
    def total(self) -> int | None:
        """Trials that the study is to have in all; None: until Ctrl-C."""
        n_trials = self.settings.n_trials
        if not self.suggester.in_order:
            return n_trials
        points = sum(1 for _ in self.space.grid())
        return points if n_trials is None else min(points, n_trials)

    @property
    def n_taken(self) -> int:
        """Trials that have finished, are running, or go on later."""
        return sum(trial.state != TrialState.FAIL for trial in self.book.trials())

    def new(self) -> int | None:
        """Enter the next trial, unless the study has enough or its space is exhausted."""
        with self.book.turn():
            n_trials = self.settings.n_trials
            if n_trials is not None and self.n_taken >= n_trials:
                return None
            suggestion = self.suggester.next(self.book.study)
            return None if suggestion is None else self.book.add(suggestion)

    def jobs(self, launch: Launch, number: int) -> Callable[[], list[JobReturn]]:
        """Return the work of a trial: to be called in any thread."""
        return partial(self._run, launch, number, self.book.point(number))

    def again(self, launch: Launch, number: int, seed: int) -> Callable[[], list[JobReturn]]:
        """Return the work of running a trial's point on another seed."""
        return partial(self._launch, launch, number, self.book.point(number), seed)

    def _run(self, launch: Launch, number: int, point: Point) -> list[JobReturn]:
        """Run a trial: once, or once per seed while it goes well."""
        returns = self._launch(launch, number, point, None)
        for repeat in range(1, self.settings.repeats):
            if values_of(returns[-1]) is None:
                break
            returns += self._launch(launch, number, point, self.seed + repeat)
        return returns

    def _launch(
        self, launch: Launch, number: int, point: Point, seed: int | None
    ) -> list[JobReturn]:
        """Launch one job; only the one with the config's own seed reports to the trial."""
        overrides = self.space.overrides(point)
        if seed is None:
            overrides.append(f"++hydra.job.env_set.{VARIABLE}='{number}'")
        else:
            key = self.settings.seed_key
            overrides = [word for word in overrides if not word.startswith(f"{key}=")]
            overrides += [f"{key}={seed}", f"hydra.sweep.subdir={number}-seed{seed}"]
        return list(launch(overrides, number))

    def settle(self, number: int, result: Any, attempt: int, *, stopping: bool) -> str:
        """Tell the study how a trial ended; return the words for it, `again ...` for a retry.

        result: what the jobs returned, or an exception.
        """
        if isinstance(result, list):
            self.returns += result
            result = failure_of(result[-1]) or result
        if isinstance(result, Interrupted):
            return "interrupted" if self.book.interrupt(number) else "taken over by another sweeper"
        if isinstance(result, BaseException):
            return self._failed(number, result, attempt, stopping=stopping)
        if isinstance(result[-1].return_value, PrunedReturn):
            self.book.prune(number)
            return "pruned"
        if result[-1].return_value is None and self.suggester.in_order:
            self.book.finish(number)  # a grid may be run for what its jobs leave behind
            return "complete"
        try:
            runs = [_numbers(job.return_value, len(self.directions)) for job in result]
        except InputError as error:
            return self._failed(number, error, attempt, stopping=stopping)
        if len(self.directions) > len(runs[0]):
            runs = [runs[0] * len(self.directions)]  # a job that diverged has one value only
        self.book.complete(number, runs)
        trial = self.book.study.get_trials(deepcopy=False)[number]
        if trial.user_attrs.get("diverged"):
            return "diverged"
        return "complete with " + ", ".join(f"{value:.5g}" for value in trial.values)

    def _failed(self, number: int, error: BaseException, attempt: int, *, stopping: bool) -> str:
        if not isinstance(error, Exception):
            raise error
        reason = reason_of(error)
        refused = isinstance(error, InputError)  # it would be refused again
        if attempt <= self.settings.retries and not refused and not stopping:
            return f"again ({reason})"
        self.book.fail(number, reason, refused=refused)
        self.failures.append(error)
        if refused and not self.book.trials(*FINISHED):
            self.error = error  # the input is wrong, not this point
        elif len(self.failures) > self.settings.max_failures and self.error is None:
            n, most = len(self.failures), self.settings.max_failures
            self.error = RuntimeError(f"{n} trials failed, hydra.sweeper.max_failures={most}")
            self.error.__cause__ = error
        return f"failed ({reason})"

    def exhausted(self) -> None:
        """Take note that no trial is left: if nothing has worked, that is an error."""
        if self.failures and self.error is None and not self.book.trials(*FINISHED):
            self.error = self.failures[-1]

    def to_confirm(self) -> list[tuple[int, int]]:
        """Return (trial, seed): the best points on fresh seeds, each seed once ever."""
        best = ranking(self.book)[: self.settings.confirm] if self.settings.confirm else []
        first = self.seed + self.settings.repeats
        known = confirmed(self.book)
        return [
            (trial.number, seed)
            for trial in best
            for seed in range(first, first + self.settings.confirm_seeds)
            if str(seed) not in known.get(trial.number, {"seeds": {}})["seeds"]
        ]

    def confirm(self, number: int, seed: int, result: Any) -> str:
        """Keep what a job on a fresh seed returned, or an exception; return the words for it."""
        value = values_of(result[-1]) if isinstance(result, list) else None
        if value is None:
            reason = failure_of(result[-1]) if isinstance(result, list) else result
            return f"is not confirmed: {reason or 'diverged'}"
        self.book.confirm(number, seed, value[0])
        return f"complete with {value[0]:.5g}"

    def _compose(self) -> dict[str, Any]:
        """Compose trials to see that they can be; return what all of them share, flat."""
        first: Point = {}
        for parameter in self.space.parameters:
            if self.space.active(parameter, first):
                first[parameter.name] = _first(parameter)
        groups = [p for p in self.space.parameters if p.name in first and self._is_group(p.name)]
        for group in groups:
            for choice in group.values():
                self._composed({**first, group.name: choice})
        config = self._composed(first)
        key = self.settings.seed_key
        several = self.settings.repeats > 1 or self.settings.confirm > 0
        self.seed = OmegaConf.select(config, key) if several else 0
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        require(whole, "hydra.sweeper.seed_key", key, "a key of the config that holds an integer")
        # The space is held against the study's by itself, and its ranges may change.
        vary = [p.name.replace("/", ".") for p in self.space.parameters]
        skip = (*NOT_IDENTITY, "method.search", *vary)
        flat = _flatten(OmegaConf.to_container(config, resolve=False))
        return {k: v for k, v in flat.items() if not any(f"{k}.".startswith(f"{s}.") for s in skip)}

    def _composed(self, point: Point) -> DictConfig:
        config = self.loader.load_sweep_config(self.master, self.space.overrides(point))
        bare = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        OmegaConf.to_container(bare, resolve=True)  # what an override refers to must exist
        return bare

    def _is_group(self, name: str) -> bool:
        return bool(self.loader.get_group_options(name.split("@")[0], ObjectType.CONFIG))


def _check(settings: DictConfig) -> None:
    values = {f"hydra.sweeper.{key}": settings[key] for key in settings if key in _LEAST}
    for key, value in values.items():
        if value is not None:
            at_least(values, key, _LEAST[key.rpartition(".")[2]])
    require(
        not raw(settings, "storage").startswith("postgresql"),
        "hydra.sweeper.storage",
        "postgresql...",
        "give it as '${oc.env:NAME}', so that no file holds the password",
    )


_LEAST = {
    "n_trials": 1,
    "n_jobs": 1,
    "seed": 0,
    "retries": 0,
    "max_failures": 0,
    "repeats": 1,
    "confirm": 0,
    "confirm_seeds": 1,
}


def raw(settings: DictConfig, key: str) -> Any:
    """Return a node with its interpolations unresolved: a trial resolves them."""
    return cast(dict, OmegaConf.to_container(settings, resolve=False))[key]


def plain(node: Any) -> Any:
    """Return a node with its interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _mapping(node: Any) -> Mapping[str, Any]:
    return plain(node) or {}


def _pruner(node: DictConfig) -> BasePruner:
    try:
        pruner = instantiate(node, _convert_="all")
    except (InstantiationException, ImportError, TypeError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"hydra.sweeper.pruner={node['_target_']}: {reason}") from error
    allowed = "must be a pruner of Optuna"
    require(isinstance(pruner, BasePruner), "hydra.sweeper.pruner", node["_target_"], allowed)
    return pruner


def _first(parameter: Any) -> Any:
    distribution = parameter.distribution
    return distribution.choices[0] if parameter.texts else distribution.low


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def reason_of(error: BaseException) -> str:
    """Return one line for an exception: its first, and what submitit says further down."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    more = [
        line for line in lines[1:] if re.match(r"has not produced|\w*(Error|Exception)\b", line)
    ]
    return " ".join([f"{type(error).__name__}: {lines[0]}", *more[:1], *more[1:][-1:]])


def failure_of(job: JobReturn) -> Exception | None:
    """Return the exception of a failed job; `return_value` would print a line and raise it."""
    return job._return_value if job.status == JobStatus.FAILED else None


def values_of(job: JobReturn) -> list[float] | None:
    """Return the values of a job that went well, else None."""
    value = job._return_value
    if job.status != JobStatus.COMPLETED or isinstance(value, PrunedReturn):
        return None
    numbers = _numbers(value, None)
    return numbers if all(abs(number) < float("inf") for number in numbers) else None


def _numbers(value: Any, n_expected: int | None) -> list[float]:
    """Read the objective: a number, or one per direction (or a single NaN or infinity)."""
    several = list(value) if isinstance(value, list | tuple) else [value]
    fits = all(isinstance(v, int | float) and not isinstance(v, bool) for v in several)
    diverged = fits and len(several) == 1 and not abs(several[0]) < float("inf")
    right = fits and (n_expected in (None, len(several)) or diverged)
    number = "a number" if n_expected in (None, 1) else f"{n_expected} numbers, as in direction"
    require(right, "value of the job", value, f"must be {number}")
    return [float(v) for v in several]

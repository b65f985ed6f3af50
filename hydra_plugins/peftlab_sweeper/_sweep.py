"""The sweep itself: ask, launch, tell, until the study has its trials."""

from __future__ import annotations

import logging
import signal
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import InstantiationException
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from optuna.pruners import BasePruner

from hydra_plugins.peftlab_sweeper._results import confirmed, ranking, write_results
from hydra_plugins.peftlab_sweeper._samplers import Suggester
from hydra_plugins.peftlab_sweeper._slots import Slots
from hydra_plugins.peftlab_sweeper._space import Point, read_space
from hydra_plugins.peftlab_sweeper._study import FINISHED, Book, directions_of
from hydra_plugins.peftlab_sweeper._view import View
from peftlab.config import NOT_IDENTITY, at_least
from peftlab.errors import InputError, require
from peftlab.pruning import check_pruner
from peftlab.storage import open_storage
from peftlab.trial import VARIABLE, Interrupted, PrunedReturn, Task

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
TICK_S = 0.5  # between two updates of the live view


class Sweep:
    """One session of a study: everything checked when constructed, nothing written before `run`.

    Raises: InputError, or an exception of Hydra's, for whatever does not fit.
    """

    def __init__(
        self,
        context: HydraContext,
        task: TaskFunction,
        config: DictConfig,
        arguments: Sequence[str],
    ) -> None:
        self.loader = context.config_loader
        self.config = config
        self.settings = settings = config.hydra.sweeper
        self.folder = Path(config.hydra.sweep.dir)
        self.cwd = Path(config.hydra.runtime.cwd)
        _check(settings)
        self.space = read_space(
            arguments,
            [_plain(settings.search), _plain(_raw(settings, "params"))],
            _plain(settings.when),
            OverridesParser.create(config_loader=self.loader),
        )
        self.directions = directions_of(_plain(settings.direction, otherwise=None))
        pruner = _pruner(settings.pruner)
        check_pruner(pruner, len(self.directions))
        enqueue = [self.space.read_point(entry) for entry in _plain(settings.enqueue) or []]
        self.suggester = Suggester(
            self.space, settings.sampler, pruner, settings.seed, enqueue, self.directions
        )
        self.facts = self._compose()
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=Task(task), config=config
        )
        in_process = config.hydra.launcher._target_ == BASIC  # Hydra may load its class anew
        logging.getLogger(BASIC.rpartition(".")[0]).setLevel(logging.WARNING)  # View says it
        n_jobs = settings.n_jobs or config.hydra.launcher.get("n_jobs") or 1
        side_by_side = "needs a launcher for jobs side by side: hydra/launcher=peftlab_workers"
        require(n_jobs == 1 or not in_process, "hydra.sweeper.n_jobs", n_jobs, side_by_side)
        self.slots = Slots(n_jobs, in_process=in_process)
        self.returns: list[JobReturn] = []
        self.failures: list[Exception] = []
        self.signals: list[int] = []
        self.error: Exception | None = None

    def run(self) -> list[JobReturn]:
        """Run the study to its end; return what the jobs of this session returned.

        Raises: InputError for a study that this one is not; RuntimeError after too many failures;
        SystemExit (128 + signal) if interrupted, with every trial able to go on.
        """
        storage = open_storage(self.settings.storage, self.cwd)
        with Book(storage, self.settings.study_name, self.directions, self.folder) as book:
            book.agree(self.space, self.facts)
            OmegaConf.save(self.config, self.folder / "multirun.yaml")
            n_trials = self.settings.n_trials
            view = View(book, n_trials, self.slots.size, in_process=self.slots.in_process)
            try:
                with view, self._signals(view):
                    self._trials(book, view)
                    if not self.stopping:
                        self._confirm(book, view)
            finally:
                book.leave()
                path = self.folder / "optimization_results.yaml"
                storage = _raw(self.settings, "storage")
                results = write_results(book, path, storage=storage, where=str(self.folder))
                if hasattr(self.launcher, "close"):
                    self.launcher.close()
            if self.signals:
                view.line("interrupted; the same command goes on from there")
                raise SystemExit(128 + self.signals[0])
            if self.error is not None:
                raise self.error
            _show_best(view, results)
        return self.returns

    @property
    def stopping(self) -> bool:
        """Whether no further trial is to start."""
        return bool(self.signals) or self.error is not None

    def _trials(self, book: Book, view: View) -> None:
        waiting = deque(book.reclaim())
        attempts: Counter[int] = Counter()
        while True:
            while not self.stopping and self.slots.free:
                number = waiting.popleft() if waiting else self._new(book)
                if number is None:
                    break
                view.starts(number, book.point(number))
                self.slots.start(number, partial(self._jobs, number, book.point(number)))
            if not self.slots.busy:
                break
            view.tick()
            if (ended := self.slots.next(TICK_S)) is None:
                continue
            number, result = ended
            attempts[number] += 1
            how = self._settle(book, number, result, attempts[number])
            if how == "again":
                waiting.append(number)
            view.ended(number, how)

        if self.failures and not self.stopping and not book.trials(*FINISHED):
            self.error = self.failures[-1]  # the space is exhausted, and nothing has worked

    def _new(self, book: Book) -> int | None:
        """Enter the next trial, unless the study has enough or its space is exhausted."""
        with book.turn():
            n_trials = self.settings.n_trials
            states = [trial.state for trial in book.trials()]
            taken = sum(state in FINISHED or state.name == "RUNNING" for state in states)
            if n_trials is not None and taken >= n_trials:
                return None
            suggestion = self.suggester.next(book.study)
            return None if suggestion is None else book.add(suggestion, self.space)

    def _jobs(self, number: int, point: Point) -> list[JobReturn]:
        """Run a trial: once, or once per seed while it goes well."""
        returns = self._launch(number, point, None)
        for repeat in range(1, self.settings.repeats):
            if _values(returns[-1]) is None:
                break
            returns += self._launch(number, point, self.seed + repeat)
        return returns

    def _launch(self, number: int, point: Point, seed: int | None) -> list[JobReturn]:
        """Launch one job; only the one with the config's own seed reports to the trial."""
        overrides = self.space.overrides(point)
        if seed is None:
            overrides.append(f"++hydra.job.env_set.{VARIABLE}='{number}'")
        else:
            key = self.settings.seed_key
            overrides = [word for word in overrides if not word.startswith(f"{key}=")]
            overrides += [f"{key}={seed}", f"hydra.sweep.subdir={number}-seed{seed}"]
        return list(self.launcher.launch([overrides], initial_job_idx=number))

    def _settle(self, book: Book, number: int, result: Any, attempt: int) -> str:
        """Tell the study how a trial ended; return the word for it."""
        if isinstance(result, Interrupted):
            book.interrupt(number)
            return "interrupted"
        if isinstance(result, list):
            self.returns += result
            result = _failure(result[-1]) or result
        if isinstance(result, BaseException):
            return self._failed(book, number, result, attempt)
        if isinstance(result[-1].return_value, PrunedReturn):
            book.prune(number)
            return "pruned"
        if result[-1].return_value is None and self.suggester.in_order:
            book.finish(number)  # a grid may be run for what its jobs leave behind
            return "complete"
        try:
            runs = [_numbers(job.return_value, len(self.directions)) for job in result]
        except InputError as error:
            return self._failed(book, number, error, attempt)
        if len(self.directions) > len(runs[0]):
            runs = [runs[0] * len(self.directions)]  # a job that diverged has one value only
        book.complete(number, runs)
        trial = book.study.get_trials(deepcopy=False)[number]
        if trial.user_attrs.get("diverged"):
            return "diverged"
        return "complete with " + ", ".join(f"{value:.5g}" for value in trial.values)

    def _failed(self, book: Book, number: int, error: BaseException, attempt: int) -> str:
        if not isinstance(error, Exception):
            raise error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        refused = isinstance(error, InputError)  # it would be refused again
        if attempt <= self.settings.retries and not refused and not self.stopping:
            return "again"
        book.fail(number, reason)
        self.failures.append(error)
        if refused and not book.trials(*FINISHED):
            self.error = error  # the input is wrong, not this point
        elif len(self.failures) > self.settings.max_failures and self.error is None:
            n, most = len(self.failures), self.settings.max_failures
            self.error = RuntimeError(f"{n} trials failed, hydra.sweeper.max_failures={most}")
            self.error.__cause__ = error
        return f"failed ({reason})"

    def _confirm(self, book: Book, view: View) -> None:
        """Run the best points again on fresh seeds, each seed once ever."""
        best = ranking(book)[: self.settings.confirm] if self.settings.confirm else []
        first = self.seed + self.settings.repeats
        seeds = [first + n for n in range(self.settings.confirm_seeds)]
        known = confirmed(book)
        todo = deque(
            (trial, seed)
            for trial in best
            for seed in seeds
            if str(seed) not in known.get(trial.number, {"seeds": {}})["seeds"]
        )
        while True:
            while todo and self.slots.free and not self.stopping:
                trial, seed = todo.popleft()
                work = partial(self._launch, trial.number, trial.params, seed)
                self.slots.start((trial.number, seed), work)
            if not self.slots.busy:
                return
            view.tick()
            if (ended := self.slots.next(TICK_S)) is None:
                continue
            (number, seed), result = ended
            value = _values(result[-1]) if isinstance(result, list) else None
            if value is None:
                reason = _failure(result[-1]) if isinstance(result, list) else result
                view.line(
                    f"trial {number} with seed {seed} is not confirmed: {reason or 'diverged'}"
                )
                continue
            book.confirm(number, seed, value[0])
            view.line(f"trial {number} with seed {seed}: {value[0]:.5g}")

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
        config = self.loader.load_sweep_config(self.config, self.space.overrides(point))
        bare = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        OmegaConf.to_container(bare, resolve=True)  # what an override refers to must exist
        return bare

    def _is_group(self, name: str) -> bool:
        return bool(self.loader.get_group_options(name.split("@")[0], ObjectType.CONFIG))

    @contextmanager
    def _signals(self, view: View) -> Iterator[None]:
        """Ctrl-C once: no new trial, running ones write their checkpoint; twice: they stop now.

        A job in this very process has handlers of its own while it runs.
        """

        def on_signal(number: int, frame: object) -> None:
            self.signals.append(number)
            if self.slots.in_process:
                raise SystemExit(128 + number)
            if hasattr(self.launcher, "interrupt"):
                self.launcher.interrupt(len(self.signals))
            elif len(self.signals) > 1:
                raise SystemExit(128 + number)
            view.line("interrupted: no further trial starts; once more stops the running ones")

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _check(settings: DictConfig) -> None:
    values = {f"hydra.sweeper.{key}": settings[key] for key in settings if key in _LEAST}
    for key, value in values.items():
        if value is not None:
            at_least(values, key, _LEAST[key.rpartition(".")[2]])
    require(
        not _raw(settings, "storage").startswith("postgresql"),
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


def _raw(settings: DictConfig, key: str) -> Any:
    """Return a node with its interpolations unresolved: a trial resolves them."""
    return cast(dict, OmegaConf.to_container(settings, resolve=False))[key]


def _plain(node: Any, otherwise: Any = {}) -> Any:  # noqa: B006 - never changed
    value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return otherwise if value is None else value


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


def _failure(job: JobReturn) -> Exception | None:
    """Return the exception of a failed job; `return_value` would print a line and raise it."""
    return job._return_value if job.status == JobStatus.FAILED else None


def _values(job: JobReturn) -> list[float] | None:
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


def _show_best(view: View, results: Mapping[str, Any]) -> None:
    if results.get("best_params") is not None:
        where = " ".join(f"{name}={value}" for name, value in results["best_params"].items())
        view.line(f"best: {results['best_value']:.5g} with {where}, in {results['best_dir']}")

"""The sweep itself: ask, launch, tell, until every study has its trials."""

from __future__ import annotations

import logging
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.peftlab_sweeper._arm import Arm
from hydra_plugins.peftlab_sweeper._arms import read_arms
from hydra_plugins.peftlab_sweeper._slots import Slots
from hydra_plugins.peftlab_sweeper._view import View
from peftlab.errors import require
from peftlab.files import to_yaml, write_atomic
from peftlab.trial import Task

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
TICK_S = 0.5  # between two updates of the live view


class Sweep:
    """One session of a sweep: everything checked when constructed, nothing written before `run`.

    Raises: InputError, or an exception of Hydra's, for whatever does not fit.
    """

    def __init__(
        self,
        context: HydraContext,
        task: TaskFunction,
        config: DictConfig,
        arguments: Sequence[str],
    ) -> None:
        self.config = config
        self.folder = Path(config.hydra.sweep.dir)
        self.arms = read_arms(context.config_loader, config, arguments)
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=Task(task), config=config
        )
        in_process = config.hydra.launcher._target_ == BASIC  # Hydra may load its class anew
        logging.getLogger(BASIC.rpartition(".")[0]).setLevel(logging.WARNING)  # View says it
        n_jobs = config.hydra.sweeper.n_jobs or config.hydra.launcher.get("n_jobs") or 1
        side_by_side = "needs a launcher for jobs side by side: hydra/launcher=peftlab_workers"
        require(n_jobs == 1 or not in_process, "hydra.sweeper.n_jobs", n_jobs, side_by_side)
        self.slots = Slots(n_jobs, in_process=in_process)
        self.signals: list[int] = []

    def run(self) -> list[JobReturn]:
        """Run every study to its end; return what the jobs of this session returned.

        Raises: InputError for a study that this one is not; RuntimeError after too many failures;
        SystemExit (128 + signal) if interrupted, with every trial able to go on.
        """
        with ExitStack() as stack:
            for arm in self.arms:
                arm.open(stack)
            OmegaConf.save(self.config, self.folder / "multirun.yaml")
            view = View(self.arms, self.slots)
            try:
                with view, self._signals(view):
                    self._trials(view)
                    if not self.stopping:
                        self._confirm(view)
            finally:
                results = {arm.label: arm.close() for arm in self.arms}
                if "" not in results:
                    content = to_yaml(_board(results))
                    write_atomic(self.folder / "optimization_results.yaml", content)
                if hasattr(self.launcher, "close"):
                    self.launcher.close()
            if self.signals:
                view.line("interrupted; the same command goes on from there")
                raise SystemExit(128 + self.signals[0])
            view.results(results)
            for arm in self.arms:
                if arm.error is not None:
                    raise arm.error
        return [job for arm in self.arms for job in arm.returns]

    @property
    def stopping(self) -> bool:
        """Whether no further trial is to start."""
        return bool(self.signals) or all(arm.error is not None for arm in self.arms)

    def _trials(self, view: View) -> None:
        waiting = deque((arm, number) for arm in self.arms for number in arm.book.reclaim())
        attempts: Counter[tuple[Arm, int]] = Counter()
        while True:
            while not self.stopping and self.slots.free:
                found = self._next(waiting)
                if found is None:
                    break
                arm, number = found
                view.starts(arm, number)
                self.slots.start(found, arm.jobs(self._launch, number))
            if not self.slots.busy:
                break
            view.tick()
            if (ended := self.slots.next(TICK_S)) is None:
                continue
            (arm, number), result = ended
            attempts[arm, number] += 1
            stopping = bool(self.signals) or arm.error is not None
            how = arm.settle(number, result, attempts[arm, number], stopping=stopping)
            if how.startswith("again"):
                waiting.append((arm, number))
            view.ended(arm, number, how)
        if not self.stopping:
            for arm in self.arms:
                arm.exhausted()

    def _next(self, waiting: deque[tuple[Arm, int]]) -> tuple[Arm, int] | None:
        """Return a trial that waits, or a new one of the arm that has had the fewest.

        So a sweep that is interrupted, or looked at on the way, is fair to all arms.
        """
        while waiting:
            arm, number = waiting.popleft()
            if arm.error is None:
                return arm, number
        going = [arm for arm in self.arms if arm.error is None]
        for arm in sorted(going, key=lambda arm: arm.n_taken):
            if (number := arm.new()) is not None:
                return arm, number
        # Meanwhile another sweeper may have died, or set its trials aside.
        waiting.extend((arm, number) for arm in going for number in arm.book.reclaim())
        return waiting.popleft() if waiting else None

    def _launch(self, overrides: list[str], number: int) -> Sequence[JobReturn]:
        return self.launcher.launch([overrides], initial_job_idx=number)

    def _confirm(self, view: View) -> None:
        """Run the best points again on fresh seeds."""
        lists = [[(arm, *pair) for pair in arm.to_confirm()] for arm in self.arms if not arm.error]
        longest = max(map(len, lists), default=0)
        todo = deque(pairs[n] for n in range(longest) for pairs in lists if n < len(pairs))
        while True:
            while todo and self.slots.free and not self.stopping:
                arm, number, seed = todo.popleft()
                work = arm.again(self._launch, number, seed)
                self.slots.start((arm, number, seed), work)
            if not self.slots.busy:
                return
            view.tick()
            if (ended := self.slots.next(TICK_S)) is None:
                continue
            (arm, number, seed), result = ended
            view.line(f"{view.name(arm, number)} seed {seed} {arm.confirm(number, seed, result)}")

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
                view.line("interrupted: no further trial starts; once more stops the running ones")
            elif len(self.signals) > 1:
                raise SystemExit(128 + number)
            else:
                view.line(
                    "interrupted: no further trial starts, and this ends with the running ones; "
                    "once more: at once, and jobs elsewhere end at their next report"
                )

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _board(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the results of several arms: the best one's under Hydra's keys, then all."""
    scored = [r for r in results.values() if r.get("best_value") is not None]
    directions = next(iter(results.values()))["directions"]
    content: dict[str, Any] = {"name": "optuna"}
    if len(directions) == 1:
        pick = max if directions == ["maximize"] else min
        best = pick(scored, key=lambda r: r["best_value"], default=None)
        content |= {key: best and best[key] for key in ("best_params", "best_value", "study_name")}
    return content | {"arms": results}

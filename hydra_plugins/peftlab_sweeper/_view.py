"""What a sweep shows: a live table where jobs run elsewhere, plain lines otherwise."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from optuna.trial import TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from hydra_plugins.peftlab_sweeper._results import confirmed, counts, ranking
from hydra_plugins.peftlab_sweeper._slots import Slots

if TYPE_CHECKING:
    from hydra_plugins.peftlab_sweeper._arm import Arm


class View:
    """Shows the studies of a sweep as they go on. Use as a context manager."""

    def __init__(self, arms: Sequence[Arm], slots: Slots) -> None:
        self.arms = arms
        self.console = Console(stderr=True, highlight=False)
        self.started = time.monotonic()
        self.n_ended = 0
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.moving = self.console.is_terminal and not slots.in_process  # a job has its own bar

    def __enter__(self) -> View:
        folder = Path(os.path.commonpath([arm.folder for arm in self.arms]))
        self.line(f"{self._title()}; runs in {folder}")
        if self.moving:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def line(self, text: str) -> None:
        """Show one line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def name(self, arm: Arm, number: int) -> str:
        """Return what a trial is called."""
        return f"{arm.label} trial {number}".lstrip()

    def starts(self, arm: Arm, number: int) -> None:
        """Show what a trial is."""
        self.line(f"{self.name(arm, number)}: {_point(arm.book.point(number))}")

    def ended(self, arm: Arm, number: int, how: str) -> None:
        """Show how a trial ended, and where its study and the whole sweep stand."""
        self.n_ended += 1
        state = f"{_state(arm)}; {_best(arm)}; {self._left()}"
        self.line(f"{self.name(arm, number)} {how}; {state}")

    def tick(self) -> None:
        """Bring the live table up to date."""
        if self.moving:
            self.live.update(self._table(), refresh=True)

    def results(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Show the best of each study; of several, as a table, best first."""
        several = len(self.arms[0].directions) > 1
        for arm in self.arms if several or "" in results else []:
            found = results[arm.label]
            if several:
                n, path = len(found["solutions"]), arm.folder / "optimization_results.yaml"
                self.line(f"{arm.label} {n} trials that no other dominates: {path}".lstrip())
            elif found["best_params"] is not None:
                best = f"best: {found['best_value']:.5g} with {_point(found['best_params'])}"
                self.line(f"{best}, in {found['best_dir']}")
        if not several and "" not in results:
            self.console.print(self._board(results))

    def _left(self) -> str:
        totals = [arm.total for arm in self.arms]
        if None in totals or not self.n_ended:
            return "time left unknown"
        left = sum(total for total in totals if total) - sum(map(_done, self.arms))
        seconds = (time.monotonic() - self.started) / self.n_ended * max(0, left)
        hours, minutes = divmod(round(seconds / 60), 60)
        long = f"{hours} h {minutes} min" if hours else f"{minutes} min"
        return f"{long} left" if seconds > 90 else f"{seconds:.0f} s left"

    def _title(self) -> str:
        first = self.arms[0]
        name = first.book.study.study_name
        what = OmegaConf.select(first.config, "objective")  # of peftlab's config, if it is one
        aims = [direction.name.lower() for direction in first.directions]
        values = (
            what if OmegaConf.is_list(what) else [what] * len(aims) if what else [""] * len(aims)
        )
        goal = ", ".join(f"{aim} {value}".strip() for aim, value in zip(aims, values, strict=False))
        return f"study {name.rpartition('/')[0] if first.label else name}: {goal}"

    def _table(self) -> Table:
        """Return one row per study, then one per running trial."""
        table = Table(title=self._title(), title_justify="left", caption=self._left())
        columns = ("study", "trials", "best so far", "with")
        for column in columns if self.arms[0].label else columns[1:]:
            table.add_column(column, overflow="fold")
        for arm in self.arms:
            ranked = ranking(arm.book) if len(arm.directions) == 1 else []
            where = _point(ranked[0].params) if ranked else ""
            table.add_row(*filter(None, [arm.label]), _state(arm), _best(arm), where)
        table.add_section()
        for arm in self.arms:
            for trial in arm.book.trials(TrialState.RUNNING):
                step = trial.last_step  # percent of the run
                now = "-" if step is None else f"{trial.intermediate_values[step]:.4g}"
                name = f"trial {trial.number}: {step or 0} %"
                table.add_row(*filter(None, [arm.label]), name, now, _point(trial.params))
        return table

    def _board(self, results: Mapping[str, Mapping[str, Any]]) -> Table:
        sign = -1 if results[self.arms[0].label]["directions"] == ["maximize"] else 1
        confirming = any(arm.settings.confirm for arm in self.arms)
        what = "mean on fresh seeds" if confirming else "best"
        table = Table(title="studies, best first", title_justify="left")
        for column in ("study", what, "spread", "trials", "with"):
            table.add_column(column, overflow="fold")
        empty = float("inf")

        def score(arm: Arm) -> float:
            value = results[arm.label]["best_value"]
            return empty if value is None else sign * value

        for arm in sorted(self.arms, key=score):
            found = results[arm.label]
            if found["best_value"] is None:
                reason = "no trial is complete" if arm.error is None else str(arm.error)
                table.add_row(arm.label, "-", "-", _state(arm), reason.splitlines()[0])
                continue
            again = confirmed(arm.book).get(found["best_trial"])
            spread = again["spread"] if again else found.get("best_spread")
            table.add_row(
                arm.label,
                f"{found['best_value']:.4f}",
                "one seed" if spread is None else f"{spread:.4f}",
                _state(arm),
                _point(found["best_params"]),
            )
        return table


def _done(arm: Arm) -> int:
    found = counts(arm.book.trials())
    return found["complete"] + found["pruned"] + found["diverged"]


def _state(arm: Arm) -> str:
    """Return "7 of 20 done (2 pruned), 2 running"."""
    found = counts(arm.book.trials())
    of = "" if arm.total is None else f" of {arm.total}"
    ways = [f"{found[how]} {how}" for how in ("pruned", "diverged") if found[how]]
    done = f"{_done(arm)}{of} done" + (f" ({', '.join(ways)})" if ways else "")
    others = [f"{found[how]} {how}" for how in ("running", "interrupted", "failed") if found[how]]
    return ", ".join([done, *others])


def _best(arm: Arm) -> str:
    if len(arm.directions) > 1:
        return f"{len(arm.book.study.best_trials)} on the Pareto front"
    ranked = ranking(arm.book)
    if not ranked:
        return "none complete"
    return f"best {ranked[0].values[0]:.5g} (trial {ranked[0].number})"


def _point(point: Mapping[str, Any]) -> str:
    """Write a point with the last part of each parameter's name, where that is enough."""
    ends = Counter(name.rpartition(".")[2] for name in point)
    names = {name: name.rpartition(".")[2] for name in point}
    shown = {name if ends[end] > 1 else end: point[name] for name, end in names.items()}
    return " ".join(f"{name}={_short(value)}" for name, value in shown.items())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

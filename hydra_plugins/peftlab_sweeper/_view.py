"""What a sweep shows: a live table where jobs run elsewhere, plain lines otherwise."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
        state = f"{_state([arm])}; {_best(arm)}; {self._left()}"
        self.line(f"{self.name(arm, number)} {how}; {state}")

    def tick(self) -> None:
        """Bring the live table up to date."""
        if self.moving:
            self.live.update(self._table(), refresh=True)

    def results(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Show the best of each study; of several, as a table, best first."""
        if "" in results:
            best = results[""]
            if best.get("best_params") is not None:
                where = " ".join(f"{k}={v}" for k, v in best["best_params"].items())
                self.line(f"best: {best['best_value']:.5g} with {where}, in {best['best_dir']}")
        elif all(len(arm.directions) == 1 for arm in self.arms):
            self.console.print(self._board(results))

    def _left(self) -> str:
        totals = [arm.settings.n_trials for arm in self.arms]
        if None in totals or not self.n_ended:
            return "time left unknown"
        now = _counts(self.arms)
        done = now["complete"] + now["pruned"] + now["diverged"]
        seconds = (time.monotonic() - self.started) / self.n_ended * max(0, sum(totals) - done)
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes} min left" if seconds > 90 else f"{seconds:.0f} s left"

    def _table(self) -> Table:
        several = len(self.arms) > 1
        name = self.arms[0].book.study.study_name
        title = f"study {name.rpartition('/')[0] if several else name}"
        table = Table(title=title, title_justify="left", caption=self._left())
        for column in (["study"] if several else []) + ["trials", "best so far", "with"]:
            table.add_column(column)
        for arm in self.arms:
            ranked = ranking(arm.book) if len(arm.directions) == 1 else []
            where = _point(ranked[0].params) if ranked else ""
            table.add_row(*[arm.label] * several, _state([arm]), _best(arm), where)
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
                table.add_row(arm.label, "-", "-", _state([arm]), reason.splitlines()[0])
                continue
            again = confirmed(arm.book).get(found["best_trial"])
            spread = again["spread"] if again else found.get("best_spread")
            table.add_row(
                arm.label,
                f"{found['best_value']:.4f}",
                "one seed" if spread is None else f"{spread:.4f}",
                _state([arm]),
                _point(found["best_params"]),
            )
        return table


def _counts(arms: Sequence[Arm]) -> Counter[str]:
    total: Counter[str] = Counter()
    for arm in arms:
        total.update(counts(arm.book.trials()))
    return total


def _state(arms: Sequence[Arm]) -> str:
    found = {name: n for name, n in _counts(arms).items() if n}
    totals = [arm.settings.n_trials for arm in arms]
    of = "" if None in totals else f" of {sum(totals)}"
    return ", ".join(f"{n} {name}" for name, n in found.items()) + of


def _best(arm: Arm) -> str:
    if len(arm.directions) > 1:
        return f"{len(arm.book.study.best_trials)} on the Pareto front"
    ranked = ranking(arm.book)
    if not ranked:
        return "none complete"
    return f"best {ranked[0].values[0]:.5g} (trial {ranked[0].number})"


def _point(point: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={_short(value)}" for name, value in point.items())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

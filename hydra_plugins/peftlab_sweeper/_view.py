"""What a sweep shows: a live table where jobs run elsewhere, plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from hydra_plugins.peftlab_sweeper._results import counts, ranking
from hydra_plugins.peftlab_sweeper._study import Book


class View:
    """Shows a study as it goes on. Use as a context manager."""

    def __init__(self, book: Book, n_trials: int | None, n_jobs: int, *, in_process: bool) -> None:
        self.book, self.n_trials, self.n_jobs = book, n_trials, n_jobs
        self.console = Console(stderr=True, highlight=False)
        self.started = time.monotonic()
        self.n_ended = 0
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.moving = self.console.is_terminal and not in_process  # a job has its own bar

    def __enter__(self) -> View:
        if self.moving:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def line(self, text: str) -> None:
        """Show one line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def starts(self, number: int, point: Mapping[str, Any]) -> None:
        """Show what a trial is."""
        where = " ".join(f"{name}={_short(value)}" for name, value in point.items())
        self.line(f"trial {number}: {where}")

    def ended(self, number: int, how: str) -> None:
        """Show how a trial ended, and where the study stands."""
        self.n_ended += 1
        self.line(f"trial {number} {how}; {self._state()}; {self._best()}; {self._left()}")

    def tick(self) -> None:
        """Bring the live table up to date."""
        if self.moving:
            self.live.update(self._table(), refresh=True)

    def _state(self) -> str:
        found = {name: n for name, n in counts(self.book.trials()).items() if n}
        of = "" if self.n_trials is None else f" of {self.n_trials}"
        return ", ".join(f"{n} {name}" for name, n in found.items()) + of

    def _best(self) -> str:
        if len(self.book.study.directions) > 1:
            return f"{len(self.book.study.best_trials)} on the Pareto front"
        ranked = ranking(self.book)
        if not ranked:
            return "none complete"
        return f"best {ranked[0].values[0]:.5g} (trial {ranked[0].number})"

    def _left(self) -> str:
        if self.n_trials is None or not self.n_ended:
            return "time left unknown"
        now = counts(self.book.trials())
        done = now["complete"] + now["pruned"] + now["diverged"]
        seconds = (time.monotonic() - self.started) / self.n_ended * max(0, self.n_trials - done)
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes} min left" if seconds > 90 else f"{seconds:.0f} s left"

    def _table(self) -> Table:
        table = Table(title=f"study {self.book.study.study_name}", title_justify="left")
        for column in ("trials", "best so far", "time left"):
            table.add_column(column)
        table.add_row(self._state(), self._best(), self._left())
        if len(self.book.study.directions) == 1 and (ranked := ranking(self.book)):
            best = "\n".join(f"{name}={_short(v)}" for name, v in ranked[0].params.items())
            table.add_row("", best, "")
        return table


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

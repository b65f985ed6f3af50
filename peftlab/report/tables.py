"""The table of a board: best tuned run per method, on the terminal and as CSV, LaTeX, Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.box import HORIZONTALS
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from peftlab.report.boards import Board, Contender, Measure, Setting
from peftlab.report.ties import RULE, UNTESTED

CHOICE = (
    "Best tuned run of each method: lowest train bits per token, the mean over its seeds (after a "
    "confirmation over the confirming seeds); ± is the standard deviation over seeds. "
    "The test split decides nothing."
)
BASE = "(base model)"
PLAIN_WIDTH = 120  # columns where there is no terminal
MISSING = "?"


@dataclass(frozen=True)
class Row:
    """One method's line; bits are per token."""

    method: str
    train: Measure
    test: Measure
    n_seeds: int
    ties: str
    params: int
    share: float | None  # of the model's parameters
    merged: str
    seconds: float | None
    memory_bytes: float | None
    trials: int
    run: str  # folder of the best setting's first run


def rows_of(board: Board) -> list[Row]:
    """Return a board's lines, lowest train loss first."""
    return [_row(board, contender, setting) for contender, setting in board.ranked]


def _row(board: Board, contender: Contender, setting: Setting) -> Row:
    first = setting.runs[0]
    total = first.total_params
    return Row(
        method=contender.label,
        train=setting.train,
        test=setting.test,
        n_seeds=len(setting.runs),
        ties=board.ties[contender.label],
        params=first.trainable_params,
        share=first.trainable_params / total if total else None,
        merged=first.merged,
        seconds=mean_of([r.seconds for r in setting.runs]),
        memory_bytes=mean_of([r.memory_bytes for r in setting.runs]),
        trials=contender.n_trials,
        run=str(first.folder),
    )


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that are known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


# Heading -> text of a cell. One home for the terminal, LaTeX and Markdown.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row.method,
    "train": lambda row: bits(row.train),
    "test": lambda row: bits(row.test),
    "seeds": lambda row: str(row.n_seeds),
    "tie": lambda row: row.ties,
    "params": lambda row: f"{row.params:,}",
    "merged": lambda row: row.merged,
    "time": lambda row: duration(row.seconds),
    "memory": lambda row: size(row.memory_bytes),
    "trials": lambda row: str(row.trials),
}
LEFT = ("method", "tie", "merged")  # the others are numbers
OPTIONAL = ("time", "memory", "merged", "seeds", "params", "test")  # first to go without room


def bits(value: Measure) -> str:
    """Return a loss and its spread, as text."""
    if value.spread is None:
        return f"{value.mean:.3f}"
    return f"{value.mean:.3f} ± {value.spread:.3f}"


def duration(seconds: float | None) -> str:
    """Return seconds in a unit that suits them."""
    if seconds is None:
        return MISSING
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def size(n_bytes: float | None) -> str:
    """Return bytes in a unit that suits them."""
    if n_bytes is None:
        return MISSING
    for unit, length in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= length:
            return f"{n_bytes / length:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def base_cells(board: Board) -> list[str]:
    """Return the last line: what the frozen model reaches."""
    train, test = board.base or (None, None)
    known = {"method": BASE, "params": "0"}
    known |= {"train": f"{train:.3f}", "test": f"{test:.3f}"} if board.base else {}
    return [known.get(heading, "") for heading in COLUMNS]


def explained(boards: Sequence[Board]) -> list[str]:
    """Return what tables need told, once: the choice, and the ties if there are any."""
    separable = any(ties != UNTESTED for board in boards for ties in board.ties.values())
    return [CHOICE, RULE] if separable else [CHOICE]


def show(boards: Sequence[Board]) -> None:
    """Print the tables to stdout, with as many columns as the terminal has room for."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    for board in boards:
        lines = [{name: cell(row) for name, cell in COLUMNS.items()} for row in rows_of(board)]
        table, left_out = _fitting(board, lines, console)
        console.print(f"{board.model} on {board.data}, bits per token", style="bold", markup=False)
        console.print(table)
        if left_out:
            words = f"No room for {', '.join(left_out)}: widen the terminal, or see --csv."
            console.print(words, markup=False)
        for note in board.notes:
            console.print(note, markup=False, soft_wrap=True)
        console.print()
    for line in explained(boards):
        console.print(line, markup=False)


def _fitting(board: Board, lines: Sequence[dict], console: Console) -> tuple[Table, list[str]]:
    """Return a table that fits the console, and the columns that are left out for that."""
    left_out: list[str] = []
    wide = console.options.update(width=10_000)
    while True:
        table = _table(board, lines, [name for name in COLUMNS if name not in left_out])
        fits = Measurement.get(console, wide, table).maximum <= console.width
        if fits or len(left_out) == len(OPTIONAL):
            return table, [name for name in COLUMNS if name in left_out]
        left_out.append(OPTIONAL[len(left_out)])


def _table(board: Board, lines: Sequence[dict], shown: Sequence[str]) -> Table:
    table = Table(box=HORIZONTALS, padding=(0, 1, 0, 0))
    for name in shown:
        table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=True)
    for line in lines:
        table.add_row(*(Text(line[name]) for name in shown))
    table.add_section()
    base = dict(zip(COLUMNS, base_cells(board), strict=True))
    table.add_row(*(base[name] for name in shown), style="dim")
    return table


def to_csv(boards: Sequence[Board]) -> str:
    """Return all boards as one CSV, numbers in full: bits per token, seconds, bytes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        "model data method train_bits_per_token train_spread test_bits_per_token test_spread "
        "seeds tie_group trainable_params trainable_fraction merged train_seconds "
        "peak_memory_bytes trials base_train_bits_per_token base_test_bits_per_token run".split()
    )
    for board in boards:
        for row in rows_of(board):
            losses = (*row.train, *row.test, row.n_seeds, row.ties)
            costs = (row.params, row.share, row.merged, row.seconds, row.memory_bytes, row.trials)
            base = board.base or (None, None)
            writer.writerow((board.model, board.data, row.method, *losses, *costs, *base, row.run))
    return out.getvalue()


def to_markdown(boards: Sequence[Board]) -> str:
    """Return a Markdown table per board."""
    parts = []
    for board in boards:
        rule = (":--" if heading in LEFT else "--:" for heading in COLUMNS)
        cells = [
            list(COLUMNS),
            *([cell(row) for cell in COLUMNS.values()] for row in rows_of(board)),
        ]
        lines = [_markdown_line(line) for line in (*cells, base_cells(board))]
        lines.insert(1, f"|{'|'.join(rule)}|")
        title = _escaped(f"{board.model} on {board.data}", "\\`*_{}[]<>#|", "\\")
        notes = [f"\n{_escaped(note, '<>|*_`', chr(92))}" for note in board.notes]
        parts.append("\n".join([f"### {title}, bits per token", "", *lines, *notes]))
    return "\n\n".join([*parts, *explained(boards)]) + "\n"


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(cell, '|<>*_`', chr(92)) for cell in cells)} |"


def to_latex(boards: Sequence[Board]) -> str:
    """Return a LaTeX table per board; it needs the package booktabs."""
    parts = []
    for board in boards:
        align = "".join("l" if heading in LEFT else "r" for heading in COLUMNS)
        cells = [[cell(row) for cell in COLUMNS.values()] for row in rows_of(board)]
        caption = f"{board.model} on {board.data}, bits per token. "
        caption += " ".join((*explained([board]), *board.notes))
        parts.append(
            "\n".join(
                [
                    "\\begin{table}",
                    "\\centering",
                    f"\\caption{{{_latex(caption)}}}",
                    f"\\begin{{tabular}}{{{align}}}",
                    "\\toprule",
                    _latex_line(list(COLUMNS)),
                    "\\midrule",
                    *map(_latex_line, cells),
                    "\\midrule",
                    _latex_line(base_cells(board)),
                    "\\bottomrule",
                    "\\end{tabular}",
                    "\\end{table}",
                ]
            )
        )
    return "% needs \\usepackage{booktabs}\n" + "\n\n".join(parts) + "\n"


def _latex_line(cells: Sequence[str]) -> str:
    return f"{' & '.join(map(_latex, cells))} \\\\"


def _latex(text: str) -> str:
    named = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    named |= {"±": "$\\pm$", "γ": "$\\gamma$", "<": "$<$", ">": "$>$"}
    return "".join(named.get(c) or (f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def _escaped(text: str, special: str, with_: str) -> str:
    return "".join(with_ + c if c in special else c for c in text)

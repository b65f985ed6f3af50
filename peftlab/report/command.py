"""`peftlab report`: reads runs, prints tables, writes the page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from peftlab.errors import InputError
from peftlab.files import write_atomic
from peftlab.report.analyses import Given, given
from peftlab.report.boards import Board, boards_of
from peftlab.report.records import read_runs
from peftlab.report.tables import show, to_csv, to_latex, to_markdown

FORMATS = {"csv": to_csv, "latex": to_latex, "markdown": to_markdown}
PAGE = Path("report.html")


def report(
    folders: Sequence[Path], *, wandb: Sequence[Path], output: Path | None, table: str | None
) -> int:
    """Report the runs below `folders` and the offline W&B runs below `wandb`; return the exit code.

    table: one of FORMATS to write that to `output` or stdout; None prints tables and writes the
    page to `output`. Raises: InputError for a folder that is not there or holds no run.
    """
    found = read_runs(folders)
    if wandb:
        from peftlab.report.offline import add_wandb  # W&B takes 1.4 s to import

        add_wandb(found, wandb)
    answers = given(found)
    for warning in found.warnings:
        _tell(warning)
    if not found.records:
        where = ", ".join(str(folder) for folder in (*folders, *wandb))
        raise InputError(f"DIR={where}: no run there; a run folder holds result.json")
    boards, apart = boards_of(found)
    for line in apart:
        _tell(line)
    ranked = [board for board in boards if board.ranked]
    for board in boards:
        if not board.ranked:
            _tell(f"{board.model} on {board.data}: {'; '.join(board.notes)}")
    if table is not None:
        _write(FORMATS[table](ranked), output)
        return 0
    show(ranked)
    _write_page(boards, answers, [*apart, *found.warnings], output)
    return 0


def _write_page(
    boards: Sequence[Board], answers: Sequence[Given], notes: Sequence[str], output: Path | None
) -> None:
    """Write the page; without plotly it is only told, unless the page was asked for by name."""
    try:
        from peftlab.report.page import page

        content = page(boards, answers, notes)
    except ModuleNotFoundError as error:
        if error.name != "plotly":
            raise
        text = "the page needs plotly: pip install 'peftlab[report]'"
        if output is not None:
            raise InputError(f"-o {output}: {text}") from error
        _tell(text)
        return
    target = output or PAGE
    _write(content, target)
    print(f"page: {target}")


def _write(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(text)
        return
    try:
        write_atomic(output, text)
    except OSError as error:
        raise InputError(f"-o {output}: cannot be written ({error.strerror})") from error


def _tell(line: str) -> None:
    print(f"peftlab: {line}", file=sys.stderr)

"""`peftlab analyze QUESTION RUN ...`: reads runs, prints a table, leaves it for the report."""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from rich.box import HORIZONTALS
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from peftlab.analysis import Analysis, Option, plain, shown
from peftlab.config import PACKAGE
from peftlab.errors import InputError, require
from peftlab.files import write_atomic
from peftlab.recorded import Record, read_record

SCHEMA = 1  # of the files
FOLDER = "analyses"  # beside the runs
PLAIN_WIDTH = 120  # columns where there is no terminal, at least


def questions() -> dict[str, str]:
    """Return name -> first line of each file of peftlab/analyses."""
    files = sorted((PACKAGE / "analyses").glob("[!_]*.py"))
    asked = {file.stem: ast.get_docstring(ast.parse(file.read_text())) or "" for file in files}
    return {name: text.partition("\n")[0] for name, text in asked.items()}


def analyze(words: Sequence[str]) -> int:
    """Answer the question that the command line asks; return the exit code.

    Raises: InputError for an unknown question, a folder without runs, or runs that do not fit it.
    """
    if not words or words[0] in ("-h", "--help"):
        _list()
        return 0
    name = words[0]
    require(name in questions(), "QUESTION", name, f"one of {', '.join(questions())}")
    module = importlib.import_module(f"peftlab.analyses.{name}")
    given = vars(_parser(name, module).parse_args(words[1:]))
    folders, output, as_csv = (given.pop(key) for key in ("runs", "output", "csv"))
    runs = [read_record(folder) for folder in run_folders(folders)]
    answer: Analysis = module.analyse(runs, **given)
    show(name, answer, as_csv=as_csv)
    path = output or default_path(name, runs, given)
    write(path, name, given, runs, answer)
    print(f"written: {path}; peftlab report shows it, too", file=sys.stderr)
    return 0


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """Return the run folders among and below `folders`, each once.

    Of those below, only completed runs count; the others are told. Raises: InputError where none
    is.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        require(folder.is_dir(), "RUN", folder, "the folder of a run, or one that holds some")
        if (folder / "result.json").is_file():
            found.setdefault(folder.resolve(), folder)
            continue
        below = list(_below(folder))
        whole = [path for path in below if _completed(path / "result.json")]
        if len(whole) < len(below):
            n_lost = len(below) - len(whole)
            print(f"{folder}: {n_lost} runs did not complete and are left out", file=sys.stderr)
        require(bool(whole), "RUN", folder, "a folder that holds completed runs")
        for path in whole:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _below(folder: Path) -> Iterator[Path]:
    for path, deeper, names in os.walk(folder):
        deeper[:] = sorted(
            (n for n in deeper if n not in ("wandb", "checkpoint") and n[0] != "."), key=_order
        )
        if "result.json" in names:
            yield Path(path)


def _order(name: str) -> list[tuple[str, int]]:
    """Sort trial 10 behind trial 9."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _completed(file: Path) -> bool:
    try:
        return json.loads(file.read_text())["status"] == "completed"
    except (ValueError, KeyError, TypeError, OSError):
        return False


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}")


def _parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"peftlab analyze {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="its folder, or one that holds runs"
    )
    options: tuple[Option, ...] = module.OPTIONS
    for option in options:
        words = option.kind if isinstance(option.kind, tuple) else None
        parser.add_argument(
            f"--{option.name}",
            type=str if isinstance(option.kind, tuple) else option.kind,
            choices=words,
            default=option.default,
            metavar=None if words else option.name.upper(),
            help=option.help if option.default is None else f"{option.help}; {option.default}",
        )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="of the answer, JSON")
    parser.add_argument("--csv", action="store_true", help="print the table as CSV, in full digits")
    return parser


def _list() -> None:
    console = Console(highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, line in questions().items():
        table.add_row(Text(name, style="bold"), Text(line))
    console.print("peftlab analyze QUESTION RUN ...     RUN: a run's folder, or a folder of runs\n")
    console.print(table)
    console.print("\nwhat a question takes: peftlab analyze QUESTION --help", markup=False)


def show(question: str, answer: Analysis, *, as_csv: bool) -> None:
    """Print the table and the notes, or the table alone as CSV."""
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        names = (f"{c.name} [{c.unit}]" if c.unit else c.name for c in answer.columns)
        writer.writerows([tuple(names), *answer.rows])
        return
    console = Console(highlight=False)
    table = Table(box=HORIZONTALS, padding=(0, 1, 0, 0))
    for place, column in enumerate(answer.columns):
        numbers = not any(isinstance(row[place], str) for row in answer.rows)
        head = Text(column.name)
        if column.unit:
            head.append(f"\n{column.unit}", style="dim")
        table.add_column(head, justify="right" if numbers else "left", overflow="fold")
    for row in answer.rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    if not console.is_terminal:
        room = console.options.update(max_width=10 * PLAIN_WIDTH)
        words = Measurement.get(console, room, table).minimum  # so that none is cut
        console = Console(highlight=False, width=max(PLAIN_WIDTH, words))
    console.print(Text(f"{question}: {answer.title}", style="bold"))
    console.print(table)
    for note in answer.notes:
        console.print(Text(f"- {note}"))


def default_path(question: str, runs: Sequence[Record], options: dict[str, Any]) -> Path:
    """Return the place of an answer: beside the runs, one file per question, runs and options.

    Raises: InputError where the runs have no folder in common but the root.
    """
    parents = [run.folder.resolve().parent for run in runs]
    common = Path(os.path.commonpath(parents))
    require(common != Path(common.anchor), "-o", None, "a FILE, as the runs lie far apart")
    identity = json.dumps([[run.run_id for run in runs], options], default=str, sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return common / FOLDER / f"{question}-{digest[:12]}.json"


def write(
    path: Path, question: str, options: dict[str, Any], runs: Sequence[Record], answer: Analysis
) -> None:
    """Write the answer as JSON. Raises: InputError if the place cannot be written."""
    content = {
        "analysis": SCHEMA,
        "question": question,
        "options": {key: None if value is None else str(value) for key, value in options.items()},
        "runs": [run.run_id for run in runs],
        **plain(asdict(answer)),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"-o {path}: cannot be written ({error.strerror})") from error

"""The page: one HTML file that holds plotly, its own script and all it shows. It asks for nothing.

The payload is numbers and plain texts in JSON; the script shows texts as texts, never as HTML.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from peftlab import __version__
from peftlab.report.analyses import Given
from peftlab.report.boards import Board, Contender, Setting
from peftlab.report.curves import curve, rounded
from peftlab.report.importance import LEAST_TRIALS, importances, studies_of
from peftlab.report.records import BrokenFile, Record
from peftlab.report.tables import explained, rows_of
from peftlab.report.tuning import GOOD, learning_rates, tuning_curve

ASSETS = files("peftlab.report") / "page"
SCRIPTS = ("state.js", "draw.js", "losses.js", "tuning.js", "run.js", "analyses.js", "main.js")
DETAIL_BYTES = 1_500_000  # of the page, for curves and configs of single runs; plotly takes 4.8 M


class Interned:
    """A list of texts, each once, and where each is."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._places: dict[str, int] = {}

    def place(self, text: str) -> int:
        """Return where `text` is; it is added if it is new."""
        if text not in self._places:
            self._places[text] = len(self.texts)
            self.texts.append(text)
        return self._places[text]


def page(boards: Sequence[Board], answers: Sequence[Given], notes: Sequence[str]) -> str:
    """Return the page. answers: to questions on the runs. notes: on the whole, for every reader.

    Raises: ModuleNotFoundError without plotly.
    """
    style = (ASSETS / "page.css").read_text()
    scripts = "\n".join((ASSETS / name).read_text() for name in SCRIPTS)
    parts = {"style": style, "plotly": plotly_script(), "script": scripts}
    parts["data"] = embedded(Payload(boards, answers, notes).content)
    before, *rest = (ASSETS / "page.html").read_text().split("{{ ")
    pieces = [before]
    for piece in rest:
        name, text = piece.split(" }}", 1)
        pieces += [parts[name], text]
    return "".join(pieces)


def plotly_script() -> str:
    """Return plotly's script, without importing plotly. Raises: ModuleNotFoundError."""
    found = importlib.util.find_spec("plotly")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("plotly is not installed", name="plotly")
    return (Path(found.origin).parent / "package_data" / "plotly.min.js").read_text("utf-8")


def embedded(content: Any) -> str:
    """Return JSON that may stand within a script element: nothing in it ends or opens a tag."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


class Payload:
    """What the page knows; `content` is it, in JSON's types."""

    def __init__(
        self, boards: Sequence[Board], answers: Sequence[Given], notes: Sequence[str]
    ) -> None:
        self.numbers: dict[int, int] = {}  # id of a record -> its number on the page
        self.folders, self.keys, self.values = Interned(), Interned(), Interned()
        self.commands = Interned()
        # The methods that were tried most come first: their colours differ.
        tried: Counter[str] = Counter()
        for contender in (c for board in boards for c in board.contenders):
            tried[contender.label] += len(contender.settings)
        labels = sorted(tried, key=lambda label: (-tried[label], label))
        self.methods = {label: n for n, label in enumerate(labels)}
        runs = [
            self._run(n, contender, setting_number, record)
            for n, board in enumerate(boards)
            for contender in board.contenders
            for setting_number, setting in enumerate(contender.settings)
            for record in setting.records
        ]
        details, n_left_out = self._details(boards)
        self.content = {
            "version": __version__,
            "notes": list(notes),
            "explained": explained(boards),
            "good": GOOD,
            "least_trials": LEAST_TRIALS,
            "methods": labels,
            "boards": [self._board(board, answers) for board in boards],
            "runs": {key: [run[key] for run in runs] for key in (runs[0] if runs else {})},
            "details": details,
            "left_out": n_left_out,
            "folders": self.folders.texts,
            "keys": self.keys.texts,
            "values": self.values.texts,
            "commands": self.commands.texts,
        }

    def _run(self, board: int, contender: Contender, setting: int, record: Record) -> dict:
        self.numbers[id(record)] = len(self.numbers)
        lr, gamma = (record.config.get(key) for key in ("optimizer.lr", "method.gamma"))
        return {
            "board": board,
            "method": self.methods[contender.label],
            "setting": setting,
            "status": record.status,
            "train": rounded(record.train),
            "test": rounded(record.test),
            "params": record.trainable_params,
            "lr": rounded(lr) if isinstance(lr, int | float) else None,
            "gamma": rounded(gamma) if isinstance(gamma, int | float) else None,
            "seed": record.seed,
            "trial": record.trial,
            "seconds": rounded(record.seconds),
            "memory": record.memory_bytes,
            "merged": record.merged,
            "folder": self.folders.place(str(record.folder.parent)),
            "name": record.folder.name,
            "in_folder": record.in_folder,
        }

    def _board(self, board: Board, answers: Sequence[Given]) -> dict:
        base = board.base
        numbers = {record.run_id: self.numbers[id(record)] for record in board.records}
        return {
            "model": board.model,
            "data": board.data,
            "base": base and [rounded(value) for value in base],
            "notes": board.notes,
            "total_params": next((r.total_params for r in board.records if r.total_params), None),
            "best": [
                self._best(contender, setting, row)
                for (contender, setting), row in zip(board.ranked, rows_of(board), strict=True)
            ],
            "tuning": [
                {"method": self.methods[c.label], **asdict(tuning_curve(c))}
                for c in board.contenders
                if c.n_trials and c.best
            ],
            "rates": [
                {"method": self.methods[c.label], "decades": rates.decades, **asdict(rates)}
                for c in board.contenders
                if base and (rates := learning_rates(c, base[0]))
            ],
            "studies": [
                {
                    "name": study.folder,
                    "runs": [self.numbers[id(s.records[0])] for _, s in study.trials],
                    "losses": [rounded(loss) for loss in study.losses],
                    "parameters": [asdict(parameter) for parameter in study.parameters],
                    "importance": importances(study),
                }
                for study in studies_of(board)
            ],
            "analyses": [
                {**given.content, "runs": [numbers[run] for run in given.runs if run in numbers]}
                for given in answers
                if any(run in numbers for run in given.runs)
            ],
        }

    def _best(self, contender: Contender, setting: Setting, row: Any) -> dict:
        first = setting.runs[0]
        return {
            "method": self.methods[contender.label],
            "runs": [self.numbers[id(record)] for record in setting.runs],
            "train": [rounded(value) for value in row.train],
            "test": [rounded(value) for value in row.test],
            "ties": row.ties,
            "params": row.params,
            "merged": row.merged,
            "seconds": rounded(row.seconds),
            "memory": row.memory_bytes and round(row.memory_bytes),
            "storage": first.stored_bytes,
            "flops": first.step_flops,
            # What merging did not put into the weights stays beside the model when it is used.
            "kept_bytes": 0 if row.merged in ("yes", "in place") else first.stored_bytes,
            "trials": row.trials,
        }

    def _details(self, boards: Sequence[Board]) -> tuple[dict[int, dict], int]:
        """Return curve, config and command of as many runs as the page has room for.

        Best settings come first, then the others, lowest train loss first, in turn between methods.
        """
        ranks: list[tuple[int, Record]] = []
        for board in boards:
            for contender in board.contenders:
                best = contender.best
                order = sorted(contender.settings, key=lambda s: (s is not best, _loss(s)))
                ranks += [(n, r) for n, setting in enumerate(order) for r in setting.records]
        details, room = {}, DETAIL_BYTES
        for _, record in sorted(ranks, key=lambda pair: pair[0]):
            detail = self._detail(record)
            room -= len(json.dumps(detail))
            if room < 0:
                break
            details[self.numbers[id(record)]] = detail
        return details, len(ranks) - len(details)

    def _detail(self, record: Record) -> dict:
        try:
            curves: dict | None = curve(record.rows())
        except (OSError, UnicodeDecodeError, BrokenFile):
            curves = None  # the page says so where they would be
        config = {k: v for k, v in record.config.items() if not k.startswith("method.search")}
        return {
            "curves": curves,
            "error": record.error,
            "command": None if record.command is None else self.commands.place(record.command),
            "config": [
                [self.keys.place(key), self.values.place(json.dumps(value, ensure_ascii=False))]
                for key, value in config.items()
            ],
        }


def _loss(setting: Setting) -> float:
    return setting.train.mean if setting.runs else float("inf")

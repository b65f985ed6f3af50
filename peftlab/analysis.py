"""What an analysis gives: a table, figures, and notes that say what cannot be concluded.

Torch is not imported here: the report reads analyses, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from peftlab.config import NOT_IDENTITY, method_name
from peftlab.errors import require
from peftlab.recorded import Record

Cell = str | int | float | None  # None: there is no such number here
ALL = "all"  # kinds of layers
MOST_KEYS = 4  # of a label; runs that differ in more are told apart by their folders


class OfKind(Protocol):
    """Something of a layer."""

    @property
    def kind(self) -> str:
        """The layer's role: "q"."""
        ...


T = TypeVar("T", bound=OfKind)


class Option(NamedTuple):
    """A setting of a question: --NAME on the command line, a keyword of its `analyse`."""

    name: str
    kind: type | tuple[str, ...]  # int, float, str, Path, or the words that are allowed
    default: Any
    help: str


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    name: str
    unit: str = ""  # nothing where there is none


@dataclass(frozen=True)
class Axis:
    """An axis of a figure."""

    title: str
    type: str = "linear"  # linear, log or category


@dataclass(frozen=True)
class Figure:
    """A figure: traces as plotly takes them, made by `line`, `bars` and `heat`."""

    title: str
    caption: str
    x: Axis
    y: Axis
    traces: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Analysis:
    """The answer to a question. Every row has as many cells as there are columns."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]  # what it assumes, what cannot be concluded
    figures: tuple[Figure, ...]


def line(name: str, x: Sequence[Cell], y: Sequence[Cell], *, mode: str = "lines+markers") -> dict:
    """Return a trace of points; mode: lines, markers or lines+markers."""
    return {"type": "scatter", "mode": mode, "name": name, "x": list(x), "y": list(y)}


def bars(name: str, x: Sequence[Cell], y: Sequence[Cell]) -> dict:
    """Return a trace of bars; those of several traces stand side by side."""
    return {"type": "bar", "name": name, "x": list(x), "y": list(y)}


def heat(name: str, x: Sequence[Cell], y: Sequence[Cell], z: Sequence[Sequence[Cell]]) -> dict:
    """Return a heat map; z[row][column] belongs to y[row] and x[column], `name` is its scale."""
    return {"type": "heatmap", "name": name, "x": list(x), "y": list(y), "z": [*map(list, z)]}


def labels(runs: Sequence[Record]) -> list[str]:
    """Return a short name for each run: its method, and the settings that tell it from others.

    Settings of method and optimizer are told where runs of one method differ in them.
    """
    names = [method_name(run.config["method"]) for run in runs]
    flat = [flatten(run.config) for run in runs]
    result = []
    for run, name, own in zip(runs, names, flat, strict=True):
        twins = [f for other, f in zip(names, flat, strict=True) if other == name]
        told = {
            key.rpartition(".")[2]: value
            for key, value in own.items()
            if any(
                f.get(key) != value
                for f in (twins if key.startswith(("method.", "optimizer.")) else flat)
            )
        }
        words = [f"{word}={_word(value)}" for word, value in told.items()]
        result.append(" ".join((name, *(words if len(words) <= MOST_KEYS else [run.folder.name]))))
    return [
        f"{name} ({run.folder})" if result.count(name) > 1 else name
        for name, run in zip(result, runs, strict=True)
    ]


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def but_seed(label: str) -> str:
    """Return a label of `labels` without its seed: the same for runs that differ in no more."""
    return " ".join(word for word in label.split(" ") if not word.startswith("seed="))


def by_kind(items: Sequence[T], *, apart: bool) -> list[tuple[str, list[T]]]:
    """Return (kind, items of it) for each kind of layer if `apart`, and last (all, all items)."""
    kinds = list(dict.fromkeys(item.kind for item in items))
    groups = [(kind, [item for item in items if item.kind == kind]) for kind in kinds]
    return [*(groups if apart and len(groups) > 1 else ()), (ALL, list(items))]


def same_model(runs: Sequence[Record]) -> None:
    """Require one model of all runs. Raises: InputError."""
    first = runs[0]
    for run in runs:
        names = [
            f"{r.result['model']['name']} ({r.result['model']['sha256'][:8]})" for r in (run, first)
        ]
        require(
            run.result["model"]["sha256"] == first.result["model"]["sha256"],
            "RUN",
            run.folder,
            f"a run on {names[1]}, as the others; this one is on {names[0]}",
        )


def flatten(node: Mapping, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> leaf of all of a config that decides the numbers of a run."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        where = f"{prefix}{key}"
        if where in NOT_IDENTITY or where == "method.search":
            continue
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{where}.")
        else:
            flat[where] = value
    return flat


def plain(value: Any) -> Any:
    """Return a table, a figure or a part of one in JSON's types; what is not finite is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def shown(cell: Cell) -> str:
    """Return a cell as text: whole numbers in groups of three digits, others to four digits."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return cell if isinstance(cell, str) else f"{cell:,}"

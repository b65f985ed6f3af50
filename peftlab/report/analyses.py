"""Analyses as the report sees them: files of `peftlab analyze`, of which nothing is trusted.

What is read is built anew from the keys that are known here, so that no other property of plotly's,
such as an image's address, reaches the page.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.report.records import BrokenFile, Found, told
from peftlab.untrusted import load_json

SCHEMA = 1
FILE_BYTES = 200_000
PAGE_BYTES = 700_000  # of all analyses on a page
CELL = object()  # a text, a finite number or null
NUMBER = object()  # a finite number or null
AXIS = {"title": str, "type": ("linear", "log", "category")}
POINTS = {"name": str, "x": [CELL], "y": [CELL]}
TRACES: dict[str, dict] = {
    "scatter": {**POINTS, "mode": ("lines", "markers", "lines+markers")},
    "bar": POINTS,
    "heatmap": {**POINTS, "z": [[NUMBER]]},
}
FIGURE = {"title": str, "caption": str, "x": AXIS, "y": AXIS, "traces": [TRACES]}
FILE = {
    "analysis": (SCHEMA,),
    "question": str,
    "title": str,
    "runs": [str],
    "columns": [{"name": str, "unit": str}],
    "rows": [[CELL]],
    "notes": [str],
    "figures": [FIGURE],
}


@dataclass(frozen=True)
class Given:
    """An answer that was given."""

    runs: list[str]  # their ids
    content: dict[str, Any]  # for the page


def given(found: Found) -> list[Given]:
    """Return the analyses in `found`; what is none, or has none of its runs, becomes a warning."""
    known = {record.run_id for record in found.records}
    answers: list[Given] = []
    room = PAGE_BYTES

    def read(file: Path) -> Given:
        answer = read_analysis(file)
        if not known & set(answer.runs):
            raise BrokenFile("an analysis of runs that are not here")
        size = len(json.dumps(answer.content))
        if size > room:
            raise BrokenFile(f"no room: a page takes {PAGE_BYTES:,} bytes of analyses")
        return answer

    for file in found.analyses:
        answer = told(found, file, read, None)
        if answer is not None:
            answers.append(answer)
            room -= len(json.dumps(answer.content))
    return answers


def read_analysis(file: Path) -> Given:
    """Return a file of `peftlab analyze`. Raises: OSError, BrokenFile."""
    size = file.stat().st_size
    if size > FILE_BYTES:
        raise BrokenFile(f"{size:,} bytes; an analysis has {FILE_BYTES:,} at most")
    try:
        value = load_json(file.read_text())
    except ValueError as error:
        raise BrokenFile(f"not JSON ({error})") from error
    content = _fitted(value, FILE, "")
    if any(len(row) != len(content["columns"]) for row in content["rows"]):
        raise BrokenFile("rows: not as many cells as columns")
    del content["analysis"]
    return Given(content.pop("runs"), content)


def _fitted(value: Any, shape: Any, where: str) -> Any:
    """Return what of `value` has this shape, or raise BrokenFile naming the key."""
    if shape is TRACES:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in tuple(TRACES):
            raise BrokenFile(f"{where}.type={kind!r:.40}: not one of {', '.join(TRACES)}")
        return {"type": kind, **_fitted(value, TRACES[kind], where)}
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise BrokenFile(f"{where or 'it'}: not an object")
        return {k: _fitted(value.get(k), s, f"{where}.{k}".lstrip(".")) for k, s in shape.items()}
    if isinstance(shape, list):
        if not isinstance(value, list):
            raise BrokenFile(f"{where}: not a list")
        return [_fitted(item, shape[0], where) for item in value]
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    fits = (
        value in shape
        if isinstance(shape, tuple)
        else isinstance(value, str) and shape in (str, CELL)
    )
    if not (fits or (shape in (CELL, NUMBER) and (number or value is None))):
        raise BrokenFile(f"{where}={value!r:.40}: not what stands there in an analysis")
    return value

"""Loss curves, thinned so that a page can hold many of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

POINTS = 60  # of a curve of single steps


def curve(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list]]:
    """Return the curves of a run: name -> [steps, bits per token].

    Evaluations are all kept. Of the single steps evenly spaced ones are, the last one among them:
    picked, not averaged, so each is a loss that was measured.
    """
    curves: dict[str, list[list]] = {}
    names = {"step": [r for r in rows if r["phase"] == "step"]}
    for split in ("train", "test"):
        names[split] = [r for r in rows if r["phase"] == "eval" and r["split"] == split]
    for name, lines in names.items():
        if lines:
            kept = evenly(lines, POINTS)
            bits = [rounded(line["bits_per_token"]) for line in kept]
            curves[name] = [[line["step"] for line in kept], bits]
    return curves


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` items, evenly spaced, the last one among them."""
    if len(items) <= most:
        return list(items)
    return [items[(n + 1) * len(items) // most - 1] for n in range(most)]


def rounded(value: float | None, digits: int = 5) -> float | None:
    """Shorten a number for the page: `digits` significant ones."""
    return None if value is None else float(f"{value:.{digits}g}")

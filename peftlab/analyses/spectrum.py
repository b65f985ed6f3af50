"""How many directions hold most of W, of its change, and of the result.

    k = min { k : Σ_{i≤k} σ_i² ≥ share · Σ σ_i² }           share = 0.9: "90 % of the variance"
    effective rank = exp(-Σ p_i ln p_i), p_i = σ_i / Σ σ_i      stable rank = Σ σ_i² / σ_1²

σ are the singular values of W, ΔW = W' - W or W' [d_out, d_in] of one layer. Rank counts those
above σ_1 · max(d_out, d_in) · 2⁻⁵²; rank per parameter is the sum of the ranks of all ΔW over the
number of trained parameters.

Source: Biderman et al. 2024, arXiv:2405.09673 (the 90 %); Roy and Vetterli 2007
(effective rank); Edalati et al. 2022, arXiv:2212.10650 (rank per parameter).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from peftlab.analysis import (
    ALL,
    Analysis,
    Axis,
    Cell,
    Column,
    Figure,
    Option,
    bars,
    by_kind,
    labels,
)
from peftlab.changes import changes, rank
from peftlab.errors import require
from peftlab.recorded import Record

OPTIONS = (Option("share", float, 0.9, "of the sum of squares that the directions are to hold"),)
MATRICES = ("W", "ΔW", "W'")
NOTES = (
    "Means over layers. A method whose change is a product of rank r has at most r directions in "
    "ΔW; what full fine-tuning uses shows only in a run of method=full on the same data.",
    "Few directions in ΔW do not show that few are enough: the run may have learned less. See "
    "both losses.",
)


class Spectrum(NamedTuple):
    """One matrix of one layer."""

    kind: str
    matrix: str  # one of MATRICES
    most: int  # min(d_out, d_in)
    directions: int  # that hold the share
    effective: float
    stable: float
    rank: int


def directions_for(s: Tensor, share: float) -> int:
    """Return how many of the singular values s, the largest first, hold `share` of Σ s²."""
    held = s.square().cumsum(0)
    enough = share * held[-1] * (1 - 1e-12)  # a sum of 9 tenths is not held up by rounding
    return int((held < enough).sum()) + 1


def effective_rank(s: Tensor) -> float:
    """Return exp of the entropy of s / Σ s."""
    p = s / s.sum()
    return torch.special.entr(p).sum().exp().item()


def stable_rank(s: Tensor) -> float:
    """Return Σ s² / s_1²."""
    return (s.square().sum() / s[0].square()).item()


def spectrum_of(kind: str, name: str, matrix: Tensor, share: float) -> Spectrum:
    """Return what is asked of one matrix."""
    s = torch.linalg.svdvals(matrix)
    held = directions_for(s, share)
    return Spectrum(kind, name, len(s), held, effective_rank(s), stable_rank(s), rank(s, matrix))


def analyse(runs: Sequence[Record], *, share: float) -> Analysis:
    """Look at every changed layer of every run. Raises: InputError for a run without ΔW."""
    require(0 < share < 1, "--share", share, "between 0 and 1")
    rows: list[tuple[Cell, ...]] = []
    for name, run in zip(labels(runs), runs, strict=True):
        found = [
            spectrum_of(change.kind, matrix, values, share)
            for change in changes(run)
            for matrix, values in zip(
                MATRICES, (change.W, change.delta, change.W + change.delta), strict=True
            )
        ]
        trained = run.result["method"]["trainable_params"]
        for kind, chosen in by_kind(found, apart=True):
            for matrix in MATRICES:
                own = [s for s in chosen if s.matrix == matrix]
                ranks = sum(s.rank for s in own)
                whole = kind == ALL and matrix == "ΔW"
                rows.append(
                    (
                        *(name, kind, matrix, len(own), fmean(s.most for s in own)),
                        fmean(s.directions for s in own),
                        fmean(s.effective for s in own),
                        fmean(s.stable for s in own),
                        ranks / len(own),
                        1000 * ranks / trained if whole else None,
                    )
                )
    heads = ("run", "kind", "matrix", "layers", "of", f"for {100 * share:g} %")
    several = len(runs) > 1
    shown = [row for row in rows if row[1] == ALL] if several else rows
    return Analysis(
        title=f"directions that hold {100 * share:g} % of the sum of squared singular values",
        columns=(
            *map(Column, heads),
            *(Column(f"{word} rank") for word in ("effective", "stable")),
            Column("rank"),
            Column("rank", "per 1,000 trained"),
        ),
        rows=tuple(rows),
        notes=NOTES,
        figures=(
            Figure(
                title=f"Directions for {100 * share:g} %",
                caption="Share of all directions that a matrix could have, mean over layers.",
                x=Axis("run" if several else "kind of layer", "category"),
                y=Axis("share of all directions"),
                traces=tuple(
                    _trace(matrix, shown, column=0 if several else 1) for matrix in MATRICES
                ),
            ),
        ),
    )


def _trace(matrix: str, rows: Sequence[tuple], column: int) -> dict:
    own = [row for row in rows if row[2] == matrix]
    return bars(matrix, [row[column] for row in own], [row[5] / row[4] for row in own])

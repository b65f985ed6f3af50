"""Whether the change amplifies directions that the weights do not emphasise.

    amplification = ‖ΔW_r‖ / ‖Uᵀ W V‖          ΔW_r = U S Vᵀ, the best rank-r part of ΔW = W' - W

W, ΔW [d_out, d_in] of one layer; U [d_out, r] and V [d_in, r] are the first r singular vectors of
ΔW; ‖·‖ is Frobenius'. The larger, the less W does in the directions in which ΔW acts. Where ΔW has
rank r at most, ΔW_r is ΔW.

Controls, with the same numerator: U and V from W itself ("W's own": the smallest value possible,
as no r directions hold more of W), and random ones, ‖Uᵀ W V‖² = r² / (d_out d_in) ‖W‖² on average.

Source: Hu et al. 2021, arXiv:2106.09685, section 7.3 and table 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch

from peftlab.analysis import (
    ALL,
    Analysis,
    Axis,
    Cell,
    Column,
    Figure,
    Option,
    by_kind,
    labels,
    line,
)
from peftlab.changes import Change, changes, directions, drawn
from peftlab.errors import require
from peftlab.recorded import Record

OPTIONS = (
    Option("rank", int, 8, "r: directions of each change that are looked at, at most"),
    Option("seed", int, 0, "of the random directions"),
)
BASES = ("ΔW's own", "W's own", "random")
NOTES = (
    "Amplification in ΔW's own directions: how many times the size of W's part there the change "
    "has. Medians over layers; ‖ΔW‖ is that of the first r directions.",
    "Near W's own: ΔW repeats W's strongest directions. Near random: it acts where W does no more "
    "than anywhere. In between: it amplifies what W has, but does not emphasise.",
    "It grows with ‖ΔW‖, that is with learning rate, scale and steps: compare runs by the ratio "
    "of two of the three columns.",
)


class Layer(NamedTuple):
    """One layer of a run."""

    kind: str
    r: int
    share: float  # ‖ΔW_r‖ / ‖W‖
    amplification: tuple[float, float, float]  # in the directions of BASES


def layer_of(change: Change, rank: int, generator: torch.Generator) -> Layer:
    """Return what is asked of one layer, with r = min(rank, rank of ΔW)."""
    W = change.W
    own = directions(change.delta, rank)
    r = len(own.s)
    most = directions(W, r)
    random = [drawn(d, r, generator).to(W) for d in W.shape]
    pairs = (own.U, own.V), (most.U, most.V), random
    size = torch.linalg.vector_norm(own.s)
    first, second, third = ((size / torch.linalg.matrix_norm(U.T @ W @ V)).item() for U, V in pairs)
    share = (size / torch.linalg.matrix_norm(W)).item()
    return Layer(change.kind, r, share, (first, second, third))


def analyse(runs: Sequence[Record], *, rank: int, seed: int) -> Analysis:
    """Look at every changed layer of every run. Raises: InputError for a run without ΔW."""
    require(rank >= 1, "--rank", rank, "at least 1")
    generator = torch.Generator().manual_seed(seed)
    names = labels(runs)
    rows: list[tuple[Cell, ...]] = []
    for name, run in zip(names, runs, strict=True):
        layers = [layer_of(change, rank, generator) for change in changes(run)]
        for kind, chosen in by_kind(layers, apart=True):
            values = (median(layer.amplification[n] for layer in chosen) for n in range(3))
            share = median(layer.share for layer in chosen)
            r = max(layer.r for layer in chosen)
            rows.append((name, kind, len(chosen), r, share, *values))
    heads = ("run", "kind", "layers", "r", "‖ΔW‖ / ‖W‖")
    shown = [row for row in rows if row[1] == ALL] if len(runs) > 1 else rows
    x = [row[0] if len(runs) > 1 else row[1] for row in shown]
    return Analysis(
        title="the change against W in the same directions, ‖ΔW‖ / ‖Uᵀ W V‖",
        columns=(*map(Column, heads), *(Column(base, "U and V") for base in BASES)),
        rows=tuple(rows),
        notes=NOTES,
        figures=(
            Figure(
                title="Amplification",
                caption="Median over layers, for directions U and V of the "
                "change, of W itself, and random ones.",
                x=Axis("run" if len(runs) > 1 else "kind of layer", "category"),
                y=Axis("‖ΔW‖ / ‖Uᵀ W V‖", "log"),
                traces=tuple(
                    line(b, x, [row[5 + n] for row in shown], mode="markers")
                    for n, b in enumerate(BASES)
                ),
            ),
        ),
    )

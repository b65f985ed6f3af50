"""Which directions runs have in common: how much of one subspace lies in another.

    φ(i, j) = ‖U_iᵀ V_j‖² / min(i, j)       from 0, orthogonal, to 1: the smaller is in the larger

U_i [d, i] and V_j [d, j] are the first singular vectors of the change W' - W [d_out, d_in] of one
layer in two runs: the right ones (side "input", d = d_in: what the change reads) or the left ones
(side "output", d = d_out: what it writes). ‖·‖ is Frobenius'. The runs may differ in rank, seed,
method or anything else but the model.

By chance, that is between two independent subspaces of uniformly random direction, φ is
max(i, j) / d on average; `drawn` is φ between such a pair, drawn for every layer.

Source: Hu et al. 2021, arXiv:2106.09685, section 7.2; there of A alone, here of the whole change:
the spaces at full rank are the same, but their directions are in the order of the change's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from peftlab.analysis import (
    Analysis,
    Axis,
    Cell,
    Column,
    Figure,
    Option,
    by_kind,
    heat,
    labels,
    line,
    same_model,
)
from peftlab.changes import changes, directions, drawn
from peftlab.errors import require
from peftlab.recorded import Record

OPTIONS = (
    Option("top", int, 8, "directions of each change that are compared, at most"),
    Option("seed", int, 0, "of the random directions"),
)
SIDES = ("input", "output")
NOTES = (
    "φ(i, j): how much of the first i directions of the one change lies in the first j of the "
    "other, as a mean over layers. 0: they share no direction; 1: the smaller lies in the larger. "
    "Compare with 'by chance': only what is far above it is common.",
    "A layer counts if both runs changed it. Common directions are not yet useful ones: see what "
    "the losses say.",
    "Directions whose singular values are nearly equal are arbitrary within their span: read φ "
    "where i and j take in such a group whole.",
)


class Overlap(NamedTuple):
    """Two runs in one layer, on one side."""

    kind: str
    phi: Tensor  # [i, j]
    chance: float  # of phi's last entry
    drawn: float  # in place of phi's last entry


def phi(U: Tensor, V: Tensor) -> Tensor:
    """Return φ(i, j) [I, J] of orthonormal columns U [d, I] and V [d, J], for all i and j."""
    i, j = (torch.arange(1, X.shape[1] + 1, device=X.device) for X in (U, V))
    overlap = (U.T @ V).square().cumsum(0).cumsum(1)
    return overlap / torch.minimum(i[:, None], j[None, :])


def analyse(runs: Sequence[Record], *, top: int, seed: int) -> Analysis:
    """Compare all pairs of runs. Raises: InputError for fewer than two, or two models."""
    require(len(runs) > 1, "RUN", runs[0].folder, "at least two runs to compare")
    require(top >= 1, "--top", top, "at least 1")
    same_model(runs)
    names = labels(runs)
    spaces = [_spaces(run, top) for run in runs]
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        (a, b): {side: _overlaps(spaces[a], spaces[b], side, generator) for side in SIDES}
        for a, b in combinations(range(len(runs)), 2)
    }
    for (a, b), sides in pairs.items():
        words = f"one that changed a layer which {runs[b].folder} changed, too"
        require(bool(sides[SIDES[0]]), "RUN", runs[a].folder, words)
    alone = len(pairs) == 1
    rows: list[tuple[Cell, ...]] = []
    for (a, b), sides in pairs.items():
        for side, overlaps in sides.items():
            for kind, chosen in by_kind(overlaps, apart=alone):
                whose = () if alone else (f"{names[a]} ~ {names[b]}",)
                rows.append((*whose, side, kind, *_numbers(chosen)))
    heads = "side", "kind", "layers", "i", "j", "φ(1, 1)", "φ(i, j)", "by chance", "drawn"
    return Analysis(
        title="directions in common, " + (" ~ ".join(names) if alone else "all pairs of runs"),
        columns=tuple(map(Column, heads if alone else ("runs", *heads))),
        rows=tuple(rows),
        notes=NOTES,
        figures=tuple(_of_pair(pairs[0, 1]) if alone else _of_runs(names, pairs)),
    )


def _spaces(run: Record, top: int) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """Return layer -> its kind, and side -> the first directions of its change."""
    spaces = {}
    for change in changes(run):
        U, _, V = directions(change.delta, top)
        spaces[change.name] = (change.kind, {"input": V, "output": U})
    return spaces


def _overlaps(
    first: Mapping, second: Mapping, side: str, generator: torch.Generator
) -> list[Overlap]:
    overlaps = []
    for layer in first:
        if layer in second:
            (kind, ours), (_, theirs) = first[layer], second[layer]
            U, V = ours[side], theirs[side]
            d, i, j = len(U), U.shape[1], V.shape[1]
            random = phi(drawn(d, i, generator), drawn(d, j, generator))[-1, -1].item()
            overlaps.append(Overlap(kind, phi(U, V), max(i, j) / d, random))
    return overlaps


def _numbers(overlaps: Sequence[Overlap]) -> tuple[Cell, ...]:
    n = len(overlaps)
    means = [
        sum(values) / n
        for values in (
            [o.phi[0, 0].item() for o in overlaps],
            [o.phi[-1, -1].item() for o in overlaps],
            [o.chance for o in overlaps],
            [o.drawn for o in overlaps],
        )
    ]
    i, j = (max(o.phi.shape[side] for o in overlaps) for side in (0, 1))
    return (n, i, j, *means)


def mean_phi(overlaps: Sequence[Overlap]) -> list[list[Cell]]:
    """Return the mean of φ(i, j) over the layers that have so many directions."""
    shape = [max(o.phi.shape[side] for o in overlaps) for side in (0, 1)]
    total, count = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape)
    for o in overlaps:
        i, j = o.phi.shape
        total[:i, :j] += o.phi.cpu()
        count[:i, :j] += 1
    return (total / count).tolist()


def _of_pair(sides: Mapping[str, Sequence[Overlap]]) -> list[Figure]:
    figures = []
    for side, overlaps in sides.items():
        cells = mean_phi(overlaps)
        i, j = (list(range(1, n + 1)) for n in (len(cells), len(cells[0])))
        chance = sum(o.chance for o in overlaps) / len(overlaps)
        figures.append(
            Figure(
                title=f"φ(i, j), {side} side",
                caption="Mean over layers: how much of the first i directions of the first run "
                f"lies in the first j of the second. By chance {chance:.3g} at the last i and j.",
                x=Axis("j, directions of the second run", "category"),
                y=Axis("i, directions of the first run", "category"),
                traces=(heat("φ", j, i, cells),),
            )
        )
        kinds: dict[str, list[float]] = {}
        for o in overlaps:
            kinds.setdefault(o.kind, []).append(o.phi[-1, -1].item())
        figures.append(
            Figure(
                title=f"Layer by layer, {side} side",
                caption="φ of all directions that were compared; one line per kind of layer.",
                x=Axis("layer, of those compared", "category"),
                y=Axis("φ"),
                traces=tuple(line(kind, list(range(len(y))), y) for kind, y in kinds.items()),
            )
        )
    return figures


def _of_runs(names: Sequence[str], pairs: Mapping[tuple[int, int], Mapping]) -> list[Figure]:
    figures = []
    for side in SIDES:
        cells: list[list[Cell]] = [[None] * len(names) for _ in names]
        for (a, b), sides in pairs.items():
            value = sum(o.phi[-1, -1].item() for o in sides[side]) / len(sides[side])
            cells[a][b] = cells[b][a] = value
        figures.append(
            Figure(
                title=f"φ between runs, {side} side",
                caption="Mean over layers, of all directions that were compared.",
                x=Axis("", "category"),
                y=Axis("", "category"),
                traces=(heat("φ", names, names, cells),),
            )
        )
    return figures

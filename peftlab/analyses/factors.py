"""How far each trained tensor moved from its start: whether half of LoRA hardly trains.

    moved = ‖T - T₀‖ / ‖T₀‖        T₀ the tensor at step 0, T in the end; ‖·‖ is Frobenius'

A factor that starts at 0 has no such number. To hold one against another there is also the root
mean square of the change of an entry, which Adam makes alike for all factors in early steps, and
it divided by that of the run's most moved factor. One row is all tensors of one name, over layers;
`least` and `most` are `moved` of single tensors.

T₀ is built again from the config and the seed, as the run built it, on this machine.

Source: Conner 2025, "Half of Lora parameters are trained very slowly": the factor that starts
random stays nearly so, unless a boost γ shortens its way.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from peftlab.analysis import Analysis, Axis, Cell, Column, Figure, labels, line
from peftlab.checkpoint import load_adapter
from peftlab.errors import require
from peftlab.method import attached, trainable
from peftlab.parts import assemble
from peftlab.recorded import ADAPTER, Record

OPTIONS = ()
NOTES = (
    "moved: 0.1 says that the tensor in the end is its start and a tenth of that size beside it; "
    "-: it starts at 0, so all of it was learned.",
    "A small move of a random factor is no loss by itself: the other factor may do the work. "
    "Whether a boost helps is told by the losses of runs with other γ, each at its best lr.",
)


class Movement(NamedTuple):
    """Tensors of one name."""

    name: str
    tensors: int
    numbers: int
    start: float  # ‖T₀‖ of all together
    change: float  # ‖T - T₀‖ of all together
    least: float | None  # moved, of single tensors; None if one starts at 0
    most: float | None

    @property
    def moved(self) -> float | None:
        """‖T - T₀‖ / ‖T₀‖."""
        return self.change / self.start if self.start else None

    @property
    def rms(self) -> float:
        """Root mean square of the change of an entry."""
        return self.change / math.sqrt(self.numbers)


def factor_name(name: str) -> str:
    """Return a tensor's name without its place: that of all its like in other layers."""
    parts = name.removeprefix("peft.").split(".")
    return ".".join("*" if part.isdigit() else part for part in parts if "/" not in part)


def movements(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> list[Movement]:
    """Compare tensors of the same names."""
    groups: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for name, before in start.items():
        before, after = before.double(), end[name].double()
        numbers = before.numel(), before.norm().item(), (after - before).norm().item()
        groups[factor_name(name)].append(numbers)
    found = []
    for name, tensors in groups.items():
        moved = [change / size for _, size, change in tensors if size]
        whole = len(moved) == len(tensors)
        found.append(
            Movement(
                name,
                len(tensors),
                sum(n for n, _, _ in tensors),
                math.hypot(*(size for _, size, _ in tensors)),
                math.hypot(*(change for _, _, change in tensors)),
                min(moved) if whole else None,
                max(moved) if whole else None,
            )
        )
    return found


def start_and_end(run: Record) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the trained tensors by name at step 0 and in the end.

    Raises: InputError if the run's model, data or adapter are not what they were.
    """
    config = {**run.config, "model": {**run.config["model"], "device": "auto"}}
    parts = assemble(config | {"compile": False, "reuse_frozen": False})
    facts = (
        ("model.sha256", parts.backbone.sha256, run.result["model"]["sha256"]),
        ("dataset.fingerprint", parts.data.fingerprint, run.result["dataset"]["fingerprint"]),
    )
    for key, found, recorded in facts:
        require(found == recorded, key, found, f"that of {run.folder}, {recorded}")
    attached(parts.net).compact()
    start = {name: p.detach().clone() for name, p in trainable(parts.net)}
    load_adapter(parts.net, run.folder / ADAPTER)
    return start, {name: p.detach() for name, p in trainable(parts.net)}


def analyse(runs: Sequence[Record]) -> Analysis:
    """Compare start and end of every run."""
    names = labels(runs)
    found = [movements(*start_and_end(run)) for run in runs]
    rows: list[tuple[Cell, ...]] = []
    for name, factors in zip(names, found, strict=True):
        fastest = max(factor.rms for factor in factors)
        for f in factors:
            relative = f.rms / fastest if fastest else None
            size = f.start / math.sqrt(f.numbers)
            numbers = (f.tensors, f.numbers, size, f.rms, f.moved, f.least, f.most, relative)
            rows.append((name, f.name, *numbers))
    factors = list(dict.fromkeys(f.name for own in found for f in own))
    moved = [{f.name: f.moved for f in own} for own in found]
    return Analysis(
        title="how far the trained tensors moved from their start",
        columns=(
            *map(Column, ("run", "factor", "tensors", "numbers")),
            Column("start", "rms"),
            Column("change", "rms"),
            Column("moved", "‖T-T₀‖/‖T₀‖"),
            Column("least", "moved"),
            Column("most", "moved"),
            Column("to the fastest", "change, rms"),
        ),
        rows=tuple(rows),
        notes=NOTES,
        figures=(
            Figure(
                title="How far factors moved",
                caption="Of all tensors of a name; no point for what starts at 0.",
                x=Axis("run", "category"),
                y=Axis("moved, ‖T - T₀‖ / ‖T₀‖", "log"),
                traces=tuple(
                    line(factor, names, [own.get(factor) for own in moved], mode="markers")
                    for factor in factors
                    if any(own.get(factor) for own in moved)
                ),
            ),
        ),
    )

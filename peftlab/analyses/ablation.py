"""Which layers' adapters matter: what is lost where they are switched off, without retraining.

    lost(i, j) = loss with the adapters of layers i..j off - loss with all on, in bits per token

for every 0 ≤ i ≤ j < L (`inside`), or with those of all other layers off (`outside`). The diagonal
is single layers, lost(0, L-1) all of them. Where a layer's own tensors were trained in place, off
means their values before training. The split is train unless --split says otherwise: whoever
chooses layers by this figure must not have chosen them on test data.

A deep model has many spans, 465 of 30 layers: neighbouring layers are then switched together, as
if they were one, in at most --groups groups of one size, the last of which may be smaller.

Source: Houlsby et al. 2019, arXiv:1902.00751, section 3.6 and figure 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftlab.analysis import Analysis, Axis, Cell, Column, Figure, Option, heat, labels
from peftlab.backbone import Backbone
from peftlab.errors import InputError, require
from peftlab.fit import evaluate
from peftlab.method import NotPartial, attached, trainable
from peftlab.parts import data_of
from peftlab.recorded import Record, restore
from peftlab.selected import SelectMethod
from peftlab.sites import decoder_blocks

WAYS = ("inside", "outside")  # of the span, where adapters are off
OPTIONS = (
    Option("split", ("train", "test"), "train", "the rows whose loss is taken"),
    Option("rows", int, 32, "how many of them, the first of the split"),
    Option("off", WAYS, "inside", "which adapters are off: those inside the span, or all others"),
    Option("groups", int, 12, "at most so many groups of layers; a model's number of layers: each"),
)
NOTES = (
    "Nothing is trained again: layers that stay on were trained together with those now off, so a "
    "small loss does not say that training without these layers would do as well.",
    "Trained tensors outside the decoder layers, such as embeddings or a final norm, stay on.",
)


class Spans(NamedTuple):
    """Losses in bits per token."""

    on: float  # all adapters on
    off: float  # all off
    lost: dict[tuple[int, int], float]  # (first, last) group of the span -> the loss beyond `on`
    groups: tuple[range, ...]  # the layers of each

    def of(self, first: int, last: int) -> float:
        """Return lost(first, last)."""
        return self.lost[first, last]

    @property
    def names(self) -> list[str]:
        """The layers of each group: "3", or "3-5"."""
        return [str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in self.groups]


def spans(
    count: int,
    loss: Callable[[Callable[[int], bool]], float],
    *,
    outside: bool = False,
    groups: int | None = None,
) -> Spans:
    """Measure every span of `count` layers, in at most `groups` groups, else one by one.

    loss: of the model with the layers on that it names.
    """
    size = math.ceil(count / (groups or count))
    parts = tuple(range(n, min(n + size, count)) for n in range(0, count, size))
    on = loss(lambda layer: True)
    lost = {}
    for first in range(len(parts)):
        for last in range(first, len(parts)):
            inside = range(parts[first][0], parts[last][-1] + 1)
            lost[first, last] = loss(lambda n, s=inside: (n in s) == outside) - on
    return Spans(on, loss(lambda layer: False), lost, parts)


@contextmanager
def acting(
    net: nn.Module, start: Mapping[str, Tensor], blocks: str, on: Callable[[int], bool]
) -> Iterator[None]:
    """Switch the method off, inside, in those decoder layers that `on` does not name.

    start: values before training of what is trained in place. blocks: name of the layers' list.
    Raises: NotPartial.
    """

    def of_layer(name: str) -> bool:
        number = name.removeprefix(f"{blocks}.").partition(".")[0]
        return not name.startswith(f"{blocks}.") or on(int(number))

    method = attached(net)
    if not isinstance(method, SelectMethod):
        with method.only(net, of_layer):
            yield
        return
    off = [(p, p.data, start[name]) for name, p in trainable(net) if not of_layer(name)]
    try:
        for p, _, before in off:
            p.data = before
        yield
    finally:
        for p, after, _ in off:
            p.data = after


def analyse(runs: Sequence[Record], *, split: str, rows: int, off: str, groups: int) -> Analysis:
    """Switch off every span of every run. Raises: InputError for a method without layers."""
    for key, value in (("rows", rows), ("groups", groups)):
        require(value >= 1, f"--{key}", value, "a whole number from 1")
    names = labels(runs)
    found = [
        _of_run(run, split=split, rows=rows, outside=off == "outside", groups=groups)
        for run in runs
    ]
    table: list[tuple[Cell, ...]] = []
    for name, own in zip(names, found, strict=True):
        last = len(own.groups) - 1
        for n, layers in enumerate(own.names):
            lost = own.of(n, n), own.of(0, n), own.of(n, last)
            table.append((name, layers, *lost))
    where = "off" if off == "inside" else "alone on"
    grouped = (f"Layers are switched in at most {groups} groups (--groups).",)
    return Analysis(
        title=f"bits per token lost with the adapters of some layers {where}; {split} split",
        columns=(
            Column("run"),
            Column("layer"),
            Column(f"this layer {where}", "bits lost"),
            Column(f"layers up to it {where}", "bits lost"),
            Column(f"layers from it {where}", "bits lost"),
        ),
        rows=tuple(table),
        notes=(
            *(
                f"{name}: {own.on:.4g} bits per token with all on, {own.off:.4g} with all off."
                for name, own in zip(names, found, strict=True)
            ),
            f"The first {rows} rows of the {split} split.",
            *(grouped if any(len(own.groups[0]) > 1 for own in found) else ()),
            *NOTES,
        ),
        figures=tuple(_figure(n, own, where) for n, own in zip(names, found, strict=True)),
    )


def _figure(name: str, own: Spans, where: str) -> Figure:
    order = range(len(own.groups))
    return Figure(
        title=f"Spans of layers: {name}",
        caption=f"Bits per token lost with the adapters from the first to the last layer {where}; "
        "the diagonal is one layer alone.",
        x=Axis("last layer", "category"),
        y=Axis("first layer", "category"),
        traces=(
            heat(
                "bits lost",
                [str(group[-1]) for group in own.groups],
                [str(group[0]) for group in own.groups],
                [[own.lost.get((first, last)) for last in order] for first in order],
            ),
        ),
    )


@torch.no_grad()
def _of_run(run: Record, *, split: str, rows: int, outside: bool, groups: int) -> Spans:
    backbone = restore(run)
    data = data_of(run.config, backbone)
    recorded = run.result["dataset"]["fingerprint"]
    told = f"that of {run.folder}, {recorded}"
    require(data.fingerprint == recorded, "dataset.fingerprint", data.fingerprint, told)
    part = getattr(data, split)
    batches = data.batches(replace(part, examples=part.examples[:rows]))
    net = backbone.net
    blocks, count = decoder_blocks(net)
    start = _start(run, backbone)
    autocast = run.config["precision"] == "bf16"

    def loss(on: Callable[[int], bool]) -> float:
        with acting(net, start, blocks, on):
            return evaluate(net, batches, backbone.loss, autocast=autocast).bits_per_token

    try:
        return spans(count, loss, outside=outside, groups=groups)
    except NotPartial as error:
        raise InputError(f"RUN={run.folder}: {error}, not on its layers one by one") from error


def _start(run: Record, backbone: Backbone) -> dict[str, Tensor]:
    """Return the values before training of what the run trained in place, if it did so."""
    if not isinstance(attached(backbone.net), SelectMethod):
        return {}
    before = restore(run, trained=False)
    return {name: p.detach() for name, p in trainable(before.net)}

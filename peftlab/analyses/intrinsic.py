"""How many dimensions are enough: d90, the smallest that reaches 90 % of the reference's gain.

    gain(d) = base - loss(d)          d90 = min { d : gain(d) ≥ share · gain(reference) }, share 0.9

loss is the final train loss in bits per token of the best run at size d (the mean over its seeds),
base that of the frozen model. The runs differ in one number among the method's arguments, the
dimension (a sweep's learning rates may differ, too); the reference is a run of full fine-tuning,
or what else --reference names, and without it the best of the runs themselves.

Nothing is interpolated: the answer is the smallest size that was tried and reaches it.

Source: Li et al. 2018, arXiv:1804.08838; Aghajanyan et al. 2020, arXiv:2012.13255, section 3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from peftlab.analysis import Analysis, Axis, Cell, Column, Figure, Option, flatten, line
from peftlab.errors import require
from peftlab.recorded import Record, read_record

OPTIONS = (
    Option("reference", Path, None, "a run whose gain is the whole; else the best of RUN ..."),
    Option("dimension", str, None, "the method's argument that is the size, if several differ"),
    Option("share", float, 0.9, "of the reference's gain that is to be reached"),
)
NOT_SIZES = ("lr", "sites", "search", "_target_")
NOTES = (
    "The best run at each size is chosen by its train loss, as is the reference; the test split "
    "decides nothing. d90 is only as good as the tuning at each size.",
    "It is a statement on this model, this data, this method and this number of epochs.",
)


class Size(NamedTuple):
    """The best setting at one size."""

    d: float
    settings: int  # that completed
    seeds: int  # of the best
    trained: int  # parameters
    train: float  # bits per token, the mean over seeds
    test: float


def argument(runs: Sequence[Record], name: str | None) -> str:
    """Return the name of the method's argument in which the runs differ.

    Raises: InputError if there is none, or if there are several and none is named.
    """
    values: dict[str, set] = defaultdict(set)
    for run in runs:
        for key, value in run.config["method"].items():
            if (
                key not in NOT_SIZES
                and isinstance(value, int | float)
                and not isinstance(value, bool)
            ):
                values[key].add(value)
    differing = [key for key, found in values.items() if len(found) > 1]
    if name is not None:
        allowed = f"one in which the runs differ: {', '.join(differing) or 'there is none'}"
        require(name in differing, "--dimension", name, allowed)
        return name
    why = "runs that differ in one number among the method's arguments"
    require(bool(differing), "RUN", runs[0].folder, f"{why}; these differ in none")
    words = f"the one that is the size, of {', '.join(differing)}"
    require(len(differing) == 1, "--dimension", None, words)
    return differing[0]


def sizes_of(runs: Sequence[Record], key: str) -> list[Size]:
    """Return the best setting at each size, the smallest size first."""
    settings: dict[float, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        setting = {k: v for k, v in flatten(run.config).items() if k != "seed"}
        settings[run.config["method"][key]][str(sorted(setting.items()))].append(run)
    sizes = []
    for d, own in sorted(settings.items()):
        best = min(own.values(), key=lambda records: _mean(records, "train"))
        trained = best[0].result["method"]["trainable_params"]
        losses = (_mean(best, split) for split in ("train", "test"))
        sizes.append(Size(d, len(own), len(best), trained, *losses))
    return sizes


def answer(gains: Mapping[float, float], whole: float, share: float) -> str:
    """Say which size is the smallest that gains `share` of `whole`. gains: by size, ascending."""
    enough = [d for d, gain in gains.items() if gain >= share * whole]
    name = f"d{100 * share:g}"
    if not enough:
        return f"{name} > {max(gains):g}: no size that was tried reaches {100 * share:g} %"
    below = [d for d in gains if d < enough[0]]
    where = f"{max(below):g} < {name} ≤" if below else f"{name} ≤"
    more = "" if below else " (no smaller size was tried)"
    back = [f"{d:g}" for d in gains if d > enough[0] and d not in enough]
    if back:
        more += f"; but not at {', '.join(back)}, so tuning or seeds decide"
    return f"{where} {enough[0]:g}{more}"


def analyse(
    runs: Sequence[Record], *, reference: Path | None, dimension: str | None, share: float
) -> Analysis:
    """Find d90. Raises: InputError for runs that cannot be compared, or of which none gains."""
    require(0 < share < 1, "--share", share, "between 0 and 1")
    whole = None if reference is None else read_record(reference)
    for run in (*runs, *([] if whole is None else [whole])):
        told = f"a run on the model, data and epochs of {runs[0].folder}"
        require(_setup(run) == _setup(runs[0]), "RUN", run.folder, told)
    method = runs[0].config["method"]["_target_"]
    for run in runs:
        told = "a run of the one method whose size differs"
        require(run.config["method"]["_target_"] == method, "RUN", run.folder, told)
    key = argument(runs, dimension)
    base = runs[0].result["base"]["train_bits_per_token"]
    sizes = sizes_of(runs, key)
    best = min(sizes, key=lambda size: size.train)
    against = best.train if whole is None else _mean([whole], "train")
    gain = base - against
    told = f"one that gains; its train loss is {against:.4g}, the frozen model's {base:.4g}"
    require(gain > 0, "--reference", reference, told)
    gains = {size.d: base - size.train for size in sizes}
    rows: list[tuple[Cell, ...]] = [
        (
            size.d,
            size.trained,
            size.settings,
            size.seeds,
            size.train,
            size.test,
            gains[size.d] / gain,
        )
        for size in sizes
    ]
    name = f"the best of these, {key}={best.d:g}" if whole is None else f"{reference}"
    uneven = sorted({size.settings for size in sizes})
    tuned = f"{uneven[0]} to {uneven[-1]}" if len(uneven) > 1 else f"{uneven[0]}"
    return Analysis(
        title=answer(gains, gain, share),
        columns=(
            Column(key),
            Column("parameters", "trained"),
            Column("settings", "completed"),
            Column("seeds"),
            Column("train", "bits/token"),
            Column("test", "bits/token"),
            Column("gain", "of the reference's"),
        ),
        rows=tuple(rows),
        notes=(
            f"Reference: {name}, {against:.4g} bits per token on the train split; the frozen model "
            f"has {base:.4g}. Settings that completed, per size: {tuned}.",
            *NOTES,
        ),
        figures=(
            Figure(
                title="Gain by size",
                caption=f"Share of the reference's gain in train bits per token; asked: {share:g}.",
                x=Axis(key, "log"),
                y=Axis("gain, of the reference's"),
                traces=(
                    line("best run", [s.d for s in sizes], [row[-1] for row in rows]),
                    line("asked", [sizes[0].d, sizes[-1].d], [share, share], mode="lines"),
                ),
            ),
        ),
    )


def _setup(run: Record) -> tuple[Any, ...]:
    result = run.result
    return result["model"]["sha256"], result["dataset"]["fingerprint"], run.config["epochs"]


def _mean(runs: Sequence[Record], split: str) -> float:
    return fmean(run.result["final"][f"{split}_bits_per_token"] for run in runs)

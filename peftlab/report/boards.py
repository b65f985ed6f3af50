"""Boards: what may be compared. One model, one data set, one best tuned run per method.

A board holds the runs that share schema, model and its sha256, data set and its fingerprint (which
is taken over the tokens, so it tells tokenizers apart, too) and number of epochs. Optimizer,
precision and quantisation may differ; where they are not the board's usual ones, the name says so.
The best setting of a method is the one with the lowest train bits per token, the mean over its
seeds; the test split decides nothing.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from peftlab.report.records import Found, Record
from peftlab.report.ties import tie_groups

TRIED = ("completed", "diverged", "pruned")  # a failed run says nothing about its setting
FEW_RATES = 5  # with fewer learning rates nothing is said about their ends
END = 0.05  # of the range of learning rates tried, on a log scale: its end


class Kind(NamedTuple):
    """What the runs of a board share."""

    schema: int
    model: str
    sha256: str
    data: str
    fingerprint: str
    epochs: str


class Measure(NamedTuple):
    """A mean over seeds, and their sample standard deviation (None with one seed)."""

    mean: float
    spread: float | None


class Setting:
    """Runs that differ in nothing but the seed. Where a sweep confirmed it, those runs count."""

    def __init__(self, records: Sequence[Record], confirming: Sequence[Record]) -> None:
        self.records = list(records)
        self.confirmed = bool(confirming)
        completed = [r for r in confirming or records if r.status == "completed"]
        # The same setting and seed is the same run, however often it was run.
        self.runs = list({r.seed: r for r in reversed(completed)}.values())[::-1]
        self.tuning = [r for r in records if r not in confirming]

    @property
    def stable(self) -> bool:
        """Whether it can be chosen: a seed has completed, and none has diverged."""
        return bool(self.runs) and all(r.status != "diverged" for r in self.records)

    @property
    def train(self) -> Measure:
        """Train bits per token."""
        return measure([r.train for r in self.runs if r.train is not None])

    @property
    def test(self) -> Measure:
        """Test bits per token."""
        return measure([r.test for r in self.runs if r.test is not None])

    @property
    def lr(self) -> float | None:
        """Peak learning rate."""
        lr = self.records[0].config.get("optimizer.lr")
        return lr if isinstance(lr, int | float) and lr > 0 else None

    @property
    def tuned_to(self) -> float | None:
        """What the tuning saw: the mean without confirming runs; None if it did not complete."""
        values = [r.train for r in self.tuning if r.train is not None]
        diverged = any(r.status == "diverged" for r in self.tuning)
        return None if diverged or not values else fmean(values)


@dataclass
class Contender:
    """One method's settings on a board, with one optimizer, precision and quantisation."""

    label: str  # the method's name, and which of these three is not the usual one
    settings: list[Setting]
    other: tuple[str, ...]  # what is not usual: ("nf4",)

    @cached_property
    def best(self) -> Setting | None:
        """The best setting: of the confirmed ones if there are any."""
        stable = [s for s in self.settings if s.stable]
        candidates = [s for s in stable if s.confirmed] or stable
        return min(candidates, key=lambda s: s.train.mean, default=None)

    @property
    def n_trials(self) -> int:
        """How many settings were tried: the tuning effort."""
        return sum(any(r.status in TRIED for r in s.records) for s in self.settings)

    @property
    def at_an_end(self) -> bool:
        """Whether the best learning rate is at an end of those tried: others were not tried."""
        rates = {s.lr for s in self.settings if s.lr is not None}
        if len(rates) < FEW_RATES or self.best is None or self.best.lr is None:
            return False
        low, high, best = (math.log(rate) for rate in (min(rates), max(rates), self.best.lr))
        return not END < (best - low) / (high - low) < 1 - END

    @property
    def outcome(self) -> str:
        """How its runs ended, in words."""
        counts = Counter(r.status for s in self.settings for r in s.records)
        return ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))


@dataclass
class Board:
    """What may be compared, and the labels that tell it from other boards."""

    kind: Kind
    model: str
    data: str
    contenders: list[Contender]
    usual: tuple[str, ...]  # optimizer, precision and quantisation of most runs
    base: tuple[float, float] | None  # train and test bits per token of the model, so quantised

    @property
    def records(self) -> list[Record]:
        """All runs of the board."""
        return [r for c in self.contenders for s in c.settings for r in s.records]

    @cached_property
    def ranked(self) -> list[tuple[Contender, Setting]]:
        """Contenders that have a best setting, lowest train loss first."""
        found = [(c, c.best) for c in self.contenders if c.best is not None]
        return sorted(found, key=lambda pair: (pair[1].train.mean, pair[0].label))

    @cached_property
    def ties(self) -> dict[str, str]:
        """Contender -> tie group."""
        return tie_groups({c.label: [r.train for r in s.runs if r.train] for c, s in self.ranked})

    @property
    def notes(self) -> list[str]:
        """What a reader must know before comparing."""
        notes = []
        if any(contender.other for contender in self.contenders):
            notes.append(f"Unless a name says otherwise: {', '.join(self.usual)}.")
        trials = [c.n_trials for c, _ in self.ranked]
        if len(set(trials)) > 1:
            notes.append(
                f"Not tuned equally hard: {min(trials)} to {max(trials)} trials per method."
            )
        if ends := [contender.label for contender, _ in self.ranked if contender.at_an_end]:
            notes.append(
                "Best learning rate at an end of those tried, so that others may do better: "
                f"{', '.join(ends)}."
            )
        if len(self.ranked) > 1 and all(len(s.runs) < 2 for _, s in self.ranked):
            notes.append("One seed each: no two methods can be separated.")
        for contender in self.contenders:
            if contender.best is None:
                notes.append(f"{contender.label} is not ranked: {contender.outcome}.")
        return notes


def measure(values: Sequence[float]) -> Measure:
    """Return mean and sample standard deviation (n - 1)."""
    return Measure(fmean(values), stdev(values) if len(values) > 1 else None)


def boards_of(found: Found) -> tuple[list[Board], list[str]]:
    """Sort runs into boards, by model and data; the notes tell which runs are kept apart, why."""
    groups: dict[Kind, list[Record]] = defaultdict(list)
    for record in found.records:
        groups[kind_of(record)].append(record)
    labels = _labels(groups)
    boards = []
    for kind, records in groups.items():
        counts = Counter(map(variant_of, records))
        usual = min(counts, key=lambda variant: (-counts[variant], variant))
        alike = [r.base for r in records if r.base and variant_of(r)[1:] == usual[1:]]
        boards.append(
            Board(
                kind=kind,
                model=labels[kind][0],
                data=labels[kind][1],
                contenders=_contenders(records, usual, found.confirmed),
                usual=usual,
                base=alike[0] if alike else None,
            )
        )
    boards.sort(key=lambda board: (board.model, board.data))
    return boards, _kept_apart(groups)


def variant_of(record: Record) -> tuple[str, ...]:
    """Return optimizer, precision and quantisation, in words."""
    quantize = record.config.get("model.quantize")
    return record.optimizer, str(record.precision), str(quantize or "not quantised")


def kind_of(record: Record) -> Kind:
    """Return what a run shares with those that it may be compared with."""
    return Kind(
        schema=record.schema,
        model=record.model,
        sha256=record.model_sha256,
        data=record.data,
        fingerprint=record.fingerprint,
        epochs=str(record.config.get("epochs")),
    )


def _labels(groups: Mapping[Kind, Sequence[Record]]) -> dict[Kind, tuple[str, str]]:
    """Return labels of model and data: the name, and that in which namesakes differ."""
    labels = {}
    for kind in groups:
        models = [k for k in groups if k.model == kind.model]
        data = [k for k in models if k.sha256 == kind.sha256 and k.data == kind.data]
        words = [f"{part} {text}" for part, text in _differences(kind, data, groups)]
        model = f"{kind.model} ({kind.sha256[:8]})" if len({k.sha256 for k in models}) > 1 else ""
        name = f"{kind.data} ({', '.join(words)})" if words else kind.data
        labels[kind] = (model or kind.model, name)
    return labels


def _differences(
    kind: Kind, others: Sequence[Kind], groups: Mapping[Kind, Sequence[Record]]
) -> list[tuple[str, str]]:
    """Return in what, and how, a kind differs from others with the same model and data names.

    A fingerprint is told by the data set's settings if these differ as well.
    """
    pairs = [
        (part, str(getattr(kind, part))[:8])
        for part in ("sha256", "fingerprint", "epochs", "schema")
        if len({getattr(other, part) for other in others}) > 1
    ]
    if all(part != "fingerprint" for part, _ in pairs):
        return pairs
    configs = {other: groups[other][0].config for other in others}
    keys = [
        key
        for key in configs[kind]
        if key.startswith("dataset.") and len({repr(c.get(key)) for c in configs.values()}) > 1
    ]
    told = {tuple(repr(config.get(key)) for key in keys) for config in configs.values()}
    if len(told) < len({other.fingerprint for other in others}):
        return pairs
    rest = [pair for pair in pairs if pair[0] != "fingerprint"]
    return [(key.removeprefix("dataset."), str(configs[kind][key])) for key in keys] + rest


def _kept_apart(groups: Mapping[Kind, Sequence[Record]]) -> list[str]:
    """One line per model and data set that has more than one board."""
    namesakes: dict[tuple[str, str], list[Kind]] = defaultdict(list)
    for kind in groups:
        namesakes[kind.model, kind.data].append(kind)
    lines = []
    for (model, data), members in sorted(namesakes.items()):
        values: dict[str, list[str]] = defaultdict(list)
        for kind in members:
            for part, text in _differences(kind, members, groups):
                values[part] += [text] if text not in values[part] else []
        if values:
            words = [f"{part} ({', '.join(sorted(texts))})" for part, texts in values.items()]
            lines.append(
                f"{model} on {data}: {len(members)} kinds of runs are kept apart, "
                f"as they differ in {' and '.join(words)}"
            )
    return lines


def _contenders(
    records: Sequence[Record],
    usual: tuple[str, ...],
    confirmed: Mapping[Path, Mapping[int, set[int]]],
) -> list[Contender]:
    groups: dict[tuple, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda r: (r.seed, _order(r))):
        words = zip(variant_of(record), usual, strict=True)
        other = tuple(word for word, normal in words if word != normal)
        groups[record.method, other][record.setting].append(record)
    return [
        Contender(
            label=f"{method} ({', '.join(other)})" if other else method,
            settings=[
                Setting(rs, [r for r in rs if _confirms(r, confirmed)]) for rs in own.values()
            ],
            other=other,
        )
        for (method, other), own in sorted(groups.items())
    ]


def _order(record: Record) -> tuple:
    """As the runs were tried: within a sweep by trial, else by folder."""
    return (record.sweep or "", record.trial or 0, str(record.folder))


def _confirms(record: Record, confirmed: Mapping[Path, Mapping[int, set[int]]]) -> bool:
    """Whether a sweep ran this seed to confirm its trial, and not to choose it."""
    if record.trial is None or record.sweep is None:
        return False
    trials = confirmed.get(Path(record.sweep).resolve(), {})
    return record.seed in trials.get(record.trial, set())

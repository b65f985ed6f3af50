"""What tuning cost and where it led: best so far against trials, and the good learning rates."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

from peftlab.report.boards import TRIED, Contender, Setting

QUANTILES = (0.1, 0.5, 0.9)  # of the best of k trials, over all orders of the trials
MOMENTS = 40  # trials that are all shown; of more, as many again
GOOD = 0.1  # of the best improvement over the base model may be missing in the good region


@dataclass(frozen=True)
class TuningCurve:
    """Best train bits per token of the first k trials; None before any has completed."""

    trials: list[int]  # k
    line: list[float | None]
    low: list[float | None]
    high: list[float | None]
    line_is: str
    band_is: str


@dataclass(frozen=True)
class LearningRates:
    """Which learning rates were tried, and which were good; the other settings are free."""

    tried: tuple[float, float]  # lowest and highest
    good: tuple[float, float]
    best: float
    n_trials: int

    @property
    def decades(self) -> float:
        """Width of the good region in powers of ten: at least this, by the trials made."""
        return math.log10(self.good[1] / self.good[0])


def tuning_curve(contender: Contender) -> TuningCurve:
    """Return the curve of a method: over its studies if it has several, else over trial orders."""
    studies: dict[str | None, list[Setting]] = defaultdict(list)
    for setting in contender.settings:
        for name in dict.fromkeys(record.sweep for record in setting.records):
            studies[name].append(setting)
    large = {name: own for name, own in studies.items() if name and len(own) > 1}
    runs = [_values(own, name) for name, own in large.items()]
    alike = len({_fixed(own) for own in large.values()}) == 1  # else they searched other things
    if len(runs) > 1 and alike:
        trials = _moments(min(map(len, runs)))
        bests = [best_so_far(run) for run in runs]
        columns = [[best[k - 1] for best in bests] for k in trials]
        low, line, high = ([of(column) for column in columns] for of in (min, median, max))
        line_is, band_is = f"median of {len(runs)} studies", "their range"
    else:
        values = runs[0] if len(runs) == 1 else _values(contender.settings, None)
        trials = _moments(len(values))
        low, line, high = ([best_of(values, k, q) for k in trials] for q in QUANTILES)
        line_is, band_is = "median over random orders of the trials", "10 to 90 % of these orders"
        if len(runs) == 1:
            best = best_so_far(values)
            line, line_is = [best[k - 1] for k in trials], "trials in the order of the study"
            band_is = "10 to 90 % of random orders of the same trials"
    low, line, high = ([_finite(v) for v in values] for values in (low, line, high))
    return TuningCurve(trials, line, low, high, line_is, band_is)


def _fixed(settings: Sequence[Setting]) -> frozenset[tuple[str, str]]:
    """Return what all trials of a study have in common."""
    items = ({(k, repr(v)) for k, v in s.records[0].config.items()} for s in settings)
    return frozenset(
        (key, value) for key, value in set.intersection(*items) if key not in ("seed", "study")
    )


def _values(settings: Sequence[Setting], study: str | None) -> list[float]:
    """Return what each trial of a study, or of all, reached; infinite if it did not complete."""
    tried = []
    for setting in settings:
        records = [r for r in setting.records if study in (None, r.sweep)]
        if any(record.status in TRIED for record in records):
            value = math.inf if setting.tuned_to is None else setting.tuned_to
            tried.append((min(record.trial or 0 for record in records), value))
    return [value for _, value in sorted(tried, key=lambda pair: pair[0])]


def best_so_far(values: Sequence[float]) -> list[float]:
    """Return the running minimum."""
    return list(accumulate(values, min))


def best_of(values: Sequence[float], k: int, quantile: float) -> float:
    """Return a quantile of the best of k of these values, drawn without replacement.

    Exact: of n sorted values, the best of k is above the i-th with probability C(n-i, k)/C(n, k).
    """
    ordered, n = sorted(values), len(values)

    def reached(i: int) -> bool:
        above = 0.0 if n - i < k else math.exp(_log_choose(n - i, k) - _log_choose(n, k))
        return 1 - above >= quantile - 1e-9

    return ordered[bisect_left(range(1, n + 1), True, key=reached)]


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _moments(n: int) -> list[int]:
    """Return the numbers of trials to show, of 1..n: all of few, ever sparser ones of many."""
    if n <= MOMENTS:
        return list(range(1, n + 1))
    sparse = {round(MOMENTS * (n / MOMENTS) ** (step / MOMENTS)) for step in range(MOMENTS + 1)}
    return [*range(1, MOMENTS), *sorted(sparse)]


def learning_rates(contender: Contender, base: float) -> LearningRates | None:
    """Return the good learning rates: where the best improvement over the base is nearly reached.

    base: train bits per token of the frozen model. None with fewer than two different rates, or
    where nothing is better than the base model.
    """
    reached: dict[float, float] = {}
    n_trials = 0
    for setting in contender.settings:
        if setting.lr is not None:
            n_trials += 1
            value = math.inf if setting.tuned_to is None else setting.tuned_to
            reached[setting.lr] = min(value, reached.get(setting.lr, math.inf))
    if len(reached) < 2 or min(reached.values()) >= base:
        return None
    best = min(reached, key=lambda lr: reached[lr])
    limit = reached[best] + GOOD * (base - reached[best])
    good = [lr for lr, value in reached.items() if value <= limit]
    return LearningRates((min(reached), max(reached)), (min(good), max(good)), best, n_trials)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

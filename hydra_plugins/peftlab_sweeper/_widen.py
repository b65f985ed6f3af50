"""Ranges that grow: where the best point lies at an end, what is beyond it is searched too.

    hydra.sweeper.widen: {optimizer.lr: 1.5}     at most 1.5 decades beyond each end

A range is a guess made for other models and longer runs. If it ends before the losses do, methods
are compared by their ranges. So while the best trial lies beyond or near an end (a tenth of the
range, in logarithms), the range goes on for another half decade. What a range is now follows
from the trials alone: a study that was killed goes on with the same one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hydra_plugins.peftlab_sweeper._space import Parameter, Space
from peftlab.errors import InputError, require

EDGE = 0.1  # part of the range, in logarithms: so far from an end is near it
STEP = 0.5  # decades


def check_widen(widen: Any, space: Space, directions: Sequence[StudyDirection]) -> dict[str, float]:
    """Read hydra.sweeper.widen: {parameter: decades}, null for none.

    Raises: InputError for a parameter that is neither searched nor fixed, decades that are no
    number above 0, or several objectives, which have no best point.
    """
    where = "hydra.sweeper.widen"
    require(widen is None or isinstance(widen, Mapping), where, widen, "{parameter: decades}")
    known = {**{p.name: p for p in space.parameters}, **space.fixed}
    for name, decades in (widen or {}).items():
        require(name in known, where, name, f"no such parameter; {', '.join(known) or 'none'}")
        fits = isinstance(decades, int | float) and not isinstance(decades, bool)
        fine = fits and 0 < decades < math.inf
        require(fine, f"{where}.{name}", decades, "decades beyond each end, a number above 0")
    if widen and len(directions) > 1:
        raise InputError(f"{where}={dict(widen)}: one objective; with several no trial is the best")
    return {name: float(decades) for name, decades in (widen or {}).items()}


def widened(
    space: Space,
    trials: Sequence[FrozenTrial],
    direction: StudyDirection,
    widen: Mapping[str, float],
) -> Space:
    """Return the space in which the next point is drawn, given a study's trials.

    Only continuous ranges on a log scale grow. A range that has grown also holds every trial that
    was drawn when the best one lay elsewhere.
    """
    ended = [t for t in trials if t.state == TrialState.COMPLETE and t.values]
    if not widen or not ended:
        return space
    sign = -1.0 if direction == StudyDirection.MAXIMIZE else 1.0
    best = min(ended, key=lambda t: (sign * t.values[0], t.number))
    grown = {}
    for parameter in space.parameters:
        ends = parameter.distribution
        if parameter.name in widen and isinstance(ends, FloatDistribution) and ends.log:
            tried = [t.params[parameter.name] for t in trials if parameter.name in t.params]
            at = best.params.get(parameter.name)
            grown[parameter.name] = _grown(parameter, ends, widen[parameter.name], at, tried)
    new = copy.copy(space)
    new.parameters = [grown.get(p.name, p) for p in space.parameters]
    return new


def _grown(
    parameter: Parameter,
    ends: FloatDistribution,
    decades: float,
    best: float | None,
    tried: Sequence[float],
) -> Parameter:
    low, high = math.log10(ends.low), math.log10(ends.high)
    down = up = 0.0  # decades beyond the ends
    if best is not None:  # with a condition, the best trial need not have this parameter
        at, edge = math.log10(best), EDGE * (high - low)
        while up < decades and at > high + up - edge:
            up = min(up + STEP, decades)
        while down < decades and at < low - down + edge:
            down = min(down + STEP, decades)
    reach = (ends.low * 10**-decades, ends.high * 10**decades)
    inside = [value for value in tried if reach[0] <= value <= reach[1]]
    least = min([ends.low * 10**-down, *inside])
    most = max([ends.high * 10**up, *inside])
    return replace(parameter, distribution=FloatDistribution(least, most, log=True))

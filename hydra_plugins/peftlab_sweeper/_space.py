"""The search space: Hydra's override grammar read as Optuna distributions.

    optimizer.lr: tag(log, interval(1e-5, 1e-2))    float, log scale; without tag: linear
    method.rank: int(interval(1, 64))               whole number, ends included; tag(log, ...) too
    method.rank: range(2, 9, 2)                     2, 4, 6, 8
    method: lora, dora  or  choice(lora, dora)      one of
    epochs=1                                        fixed: part of every trial

A parameter with a condition (`when`) is drawn only where another one has given values.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    QuotedString,
    RangeSweep,
    Transformer,
)
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.trial import Trial

from peftlab.errors import InputError, require

Value = None | bool | int | float | str
Point = dict[str, Value]


@dataclass
class Parameter:
    """One dimension of the space."""

    name: str  # the config's key, or a config group
    prefix: str  # what precedes it in an override: "", "+" or "++"
    given: str  # as written, for messages
    distribution: BaseDistribution
    texts: dict[Value, str] = field(default_factory=dict)  # of a choice: how an override says it
    when: dict[str, tuple[Value, ...]] = field(default_factory=dict)

    def override(self, value: Value) -> str:
        """Write the override that sets this parameter."""
        text = self.texts[value] if self.texts else repr(value)
        return f"{self.prefix}{self.name}={text}"

    def values(self) -> list[Value]:
        """Return all values in order. Raises: InputError for a continuous range."""
        match self.distribution:
            case CategoricalDistribution(choices=choices):
                return list(choices)
            case IntDistribution(low=low, high=high, step=step, log=False):
                return list(range(low, high + 1, step))
            case FloatDistribution(low=low, high=high, step=float(step)):
                return [low + step * n for n in range(round((high - low) / step) + 1)]
        raise InputError(
            f"{self.given}: a grid needs values that can be counted, a choice or range"
        )

    def draw(self, trial: Trial) -> Value:
        """Let Optuna draw a value."""
        match self.distribution:
            case CategoricalDistribution(choices=choices):
                return trial.suggest_categorical(self.name, choices)
            case IntDistribution(low=low, high=high, step=step, log=log):
                return trial.suggest_int(self.name, low, high, step=step, log=log)
            case FloatDistribution(low=low, high=high, step=step, log=log):
                return trial.suggest_float(self.name, low, high, step=step, log=log)
        raise TypeError(self.distribution)


class Space:
    """All parameters, and the overrides that every trial shares, in the order they were given.

    Raises: InputError for a range that is none, or a condition that names nothing.
    """

    def __init__(self, overrides: Sequence[Override], when: Mapping[str, Any]) -> None:
        self.parts: list[Parameter | str] = []  # in the order of the overrides
        self.fixed: dict[str, Value] = {}
        for override in overrides:
            if override.is_sweep_override():
                self.parts.append(_parameter(override))
            else:
                self.fixed[_name(override)] = None if override.is_delete() else _plain(override)
                self.parts.append(override.input_line or "")
        given = {part.name: part for part in self.parts if isinstance(part, Parameter)}
        for name, condition in when.items():
            known = ", ".join(given) or "none is searched"
            require(name in given, "hydra.sweeper.when", name, f"no such parameter; {known}")
            given[name].when = self._condition(name, condition, given)
        self.parameters = _ordered(given)

    def _condition(
        self, name: str, condition: Any, given: Mapping[str, Parameter]
    ) -> dict[str, tuple[Value, ...]]:
        where = f"hydra.sweeper.when.{name}"
        require(isinstance(condition, Mapping), where, condition, "{other parameter: value(s)}")
        read = {}
        for other, allowed in condition.items():
            known = ", ".join([*(n for n in given if n != name), *self.fixed])
            there = other != name and (other in given or other in self.fixed)
            require(there, where, other, f"neither searched nor given here; {known}")
            values = tuple(allowed) if isinstance(allowed, Sequence | set) else (allowed,)
            values = (allowed,) if isinstance(allowed, str) else values
            if other in given:
                for value in values:
                    _check_inside(given[other], value, f"{where}.{other}")
            read[other] = values
        return read

    def active(self, parameter: Parameter, point: Mapping[str, Value]) -> bool:
        """Whether `parameter` exists where `point` (all it depends on) is."""
        known = {**self.fixed, **point}
        return all(
            name in known and known[name] in allowed for name, allowed in parameter.when.items()
        )

    def draw(self, trial: Trial) -> Point:
        """Draw a point with Optuna's trial."""
        point: Point = {}
        for parameter in self.parameters:
            if self.active(parameter, point):
                point[parameter.name] = parameter.draw(trial)
        return point

    def grid(self) -> Iterator[Point]:
        """All points, the last parameter fastest; with conditions, each once."""
        order = [part for part in self.parts if isinstance(part, Parameter)]
        seen = set()
        for values in itertools.product(*(parameter.values() for parameter in order)):
            whole = dict(zip((p.name for p in order), values, strict=True))
            point: Point = {}
            for parameter in self.parameters:
                if self.active(parameter, point):
                    point[parameter.name] = whole[parameter.name]
            if (key := identity(point)) not in seen:
                seen.add(key)
                yield point

    def distributions(self, point: Mapping[str, Value]) -> dict[str, BaseDistribution]:
        """Return the distributions of the parameters that `point` has."""
        return {p.name: p.distribution for p in self.parameters if p.name in point}

    def overrides(self, point: Mapping[str, Value]) -> list[str]:
        """Write the overrides of a trial at `point`, in the order in which they were given."""
        return [
            part.override(point[part.name]) if isinstance(part, Parameter) else part
            for part in self.parts
            if not isinstance(part, Parameter) or part.name in point
        ]

    def read_point(self, entry: Any) -> Point:
        """Check a point of `enqueue`. Raises: InputError naming what does not fit."""
        where = "hydra.sweeper.enqueue"
        require(isinstance(entry, Mapping), where, entry, "a list of {parameter: value}")
        given = {parameter.name: parameter for parameter in self.parameters}
        for name, value in entry.items():
            known = ", ".join(given)
            require(name in given, where, f"{{{name}: {value}}}", f"no such parameter; {known}")
            _check_inside(given[name], value, f"{where}.{name}")
        return dict(entry)

    def contains(self, point: Mapping[str, Value]) -> bool:
        """Whether every value lies in its range, and exactly the right parameters are there."""
        names = {p.name for p in self.parameters if self.active(p, point)}
        inside = all(_inside(p, point[p.name]) for p in self.parameters if p.name in point)
        return names == set(point) and inside

    def record(self) -> dict[str, Any]:
        """Return what must stay the same when a study goes on: all but the ends of ranges."""
        return {parameter.name: _lasting(parameter) for parameter in self.parameters}


def read_space(
    arguments: Sequence[str],
    ranges: Sequence[Mapping[str, Any]],
    when: Mapping[str, Any],
    parser: OverridesParser,
) -> Space:
    """Read the space from the words of the command line and from ranges, later ones winning.

    Raises: InputError for what is not Hydra's grammar, and as `Space` does.
    """
    merged: dict[str, Override] = {}
    for key, text in [pair for mapping in ranges for pair in mapping.items()]:
        override = _parse(parser, f"{key}={_text(text)}")
        merged[_name(override)] = override
    for word in arguments:
        override = _parse(parser, word)
        merged[_name(override)] = override
    return Space(list(merged.values()), when)


def identity(point: Mapping[str, Value]) -> str:
    """Return a text that is the same for equal points only."""
    return json.dumps(dict(point), sort_keys=True)


def _parse(parser: OverridesParser, text: str) -> Override:
    try:
        return parser.parse_override(text)
    except HydraException as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{text}: not a range in Hydra's grammar ({reason})") from error


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _name(override: Override) -> str:
    package = "" if override.package is None else f"@{override.package}"
    return f"{override.key_or_group}{package}"


def _plain(override: Override) -> Any:
    value = override.value()
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _parameter(override: Override) -> Parameter:
    given = override.input_line or ""
    element = override.get_key_element()
    prefix = element[: len(element) - len(element.lstrip("+"))]
    sweep = override.value()
    tags = set(getattr(sweep, "tags", ()))
    require(tags <= {"log"}, given, ", ".join(sorted(tags)), "the only tag is log")
    log = "log" in tags
    try:
        match sweep:
            case IntervalSweep(start=int(low), end=int(high)):
                distribution = IntDistribution(low, high, log=log)
            case IntervalSweep(start=float(low), end=float(high)):
                distribution = FloatDistribution(low, high, log=log)
            case RangeSweep(start=int(low), stop=int(stop), step=int(step)) if step > 0:
                last = low + (stop - low - 1) // step * step  # Hydra's range excludes its end
                distribution = IntDistribution(low, last, log=log, step=step)
            case RangeSweep():
                values = [float(cast(float, value)) for value in override.sweep_iterator()]
                step = values[1] - values[0] if len(values) > 1 else None
                distribution = FloatDistribution(values[0], values[-1], log=log, step=step)
            case _:
                texts = {_category(v): Transformer.str(v) for v in override.sweep_iterator()}
                require(bool(texts), given, "nothing", "at least one value")
                require(not log, given, "log", "only an interval or range has a scale")
                distribution = CategoricalDistribution(list(texts))
                return Parameter(_name(override), prefix, given, distribution, texts)
    except (ValueError, IndexError, HydraException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{given}: {str(error).splitlines()[0]}") from error
    ends = (distribution.low, distribution.high)
    require(all(map(math.isfinite, ends)), given, ends, "both ends must be finite")
    return Parameter(_name(override), prefix, given, distribution)


def _category(element: Any) -> Value:
    """Return a choice as Optuna stores it: a plain value, or the text of a list or mapping."""
    if isinstance(element, QuotedString):
        return element.text
    return (
        element
        if isinstance(element, bool | int | float | str | None)
        else Transformer.str(element)
    )


def _inside(parameter: Parameter, value: Any) -> bool:
    distribution = parameter.distribution
    if isinstance(distribution, CategoricalDistribution):
        return any(value == choice and type(value) is type(choice) for choice in parameter.texts)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    whole = not isinstance(distribution, IntDistribution) or value == int(value or 0)
    return number and whole and distribution._contains(value)


def _check_inside(parameter: Parameter, value: Any, where: str) -> None:
    require(_inside(parameter, value), where, value, f"must be in {parameter.given}")


def _ordered(given: Mapping[str, Parameter]) -> list[Parameter]:
    """Sort so that a condition's parameters come first. Raises: InputError for a cycle."""
    done: list[Parameter] = []
    left = list(given.values())
    while left:
        names = {parameter.name for parameter in left}
        ready = [parameter for parameter in left if not names & set(parameter.when)]
        if not ready:
            cycle = ", ".join(names)
            raise InputError(f"hydra.sweeper.when={cycle}: each waits for the other")
        done += ready
        left = [parameter for parameter in left if parameter not in ready]
    return done


def _lasting(parameter: Parameter) -> dict[str, Any]:
    stored = json.loads(distribution_to_json(parameter.distribution))
    facts = {k: v for k, v in stored["attributes"].items() if k not in ("low", "high")}
    return {
        "kind": stored["name"],
        **facts,
        "when": {k: list(v) for k, v in parameter.when.items()},
    }

"""Sizes of a method that meet a parameter budget: how methods are compared at equal parameters.

A method's dimensions are those settings of its `search` that its count of trained parameters
depends on, by the closed form of its docstring: rank, bottleneck, l_a ... No list of them exists.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peftlab.backbone import conv1d_to_linear, locate
from peftlab.cards import card
from peftlab.config import method_name
from peftlab.errors import InputError, require
from peftlab.parts import NOT_ARGUMENTS, build_method
from peftlab.sites import find_sites, kinds_of

TOLERANCE = 0.02  # of the budget
OCTAVES = 20  # a dimension is at most 2^20 times its default, or as much smaller
STEPS = 4  # per octave, when several dimensions are weighed against each other
HALVINGS = 28  # of 40 octaves: to a ten-millionth
Count = Callable[[Mapping[str, float]], int]  # trained parameters with some settings changed


def solve(model: Mapping, method: Mapping, budget: int, tolerance: float) -> dict[str, float]:
    """Return the dimensions with which `method` trains `budget` parameters, to within `tolerance`.

    Of several solutions the one whose dimensions change most evenly from their defaults, i.e.
    with the least sum of squared log ratios. model, method: config groups.
    Raises: InputError if no dimension meets the budget, naming what comes nearest.
    """
    require(isinstance(budget, int) and budget > 0, "aux.budget", budget, "a whole number, from 1")
    count = counter(model, method)
    start = dimensions(method, count)
    found, nearest = _search(count, start, budget, tolerance)
    name, refusal = method_name(method), ""
    for changes in found:
        try:
            build_method({**method, **changes}, _skeleton(*_key(model)), model["kinds"])
        except InputError as error:  # within the budget, but out of the method's own bounds
            refusal = str(error)
            continue
        return changes
    if found:
        raise InputError(f"aux.budget={budget}: {name} cannot have {_show(found[0])} ({refusal})")
    closest = f"{count(nearest):,} with {_show(nearest)}" if start else f"{count({}):,}, always"
    allowed = f"within {tolerance:.0%} of a count that {name} can have; the nearest is {closest}"
    raise InputError(f"aux.budget={budget}: {allowed}")


def solve_one(
    model: Mapping, method: Mapping, name: str, budget: int, tolerance: float
) -> int | float:
    """Return the value of the one dimension `name` that meets the budget, the others as they are.

    Raises: InputError as `solve` does, and for a name that is no dimension of the method.
    """
    known = dimensions(method, counter(model, method))
    allowed = ", ".join(known) or "it has none"
    require(name in known, f"dimension of {method_name(method)}", name, f"one of {allowed}")
    only = {**method, "search": {f"method.{name}": None}}
    return solve(model, only, budget, tolerance)[name]


def counter(model: Mapping, method: Mapping) -> Count:
    """Return a function that counts trained parameters by the closed form of the docstring."""
    net = _skeleton(*_key(model))
    kinds = kinds_of(net.config.model_type, model["kinds"])
    sites = find_sites(net, kinds, method["sites"])
    n_params, sizes = sum(p.numel() for p in net.parameters()), model_sizes(net)
    formula = card(method_name(method))
    given = {k: v for k, v in method.items() if k not in NOT_ARGUMENTS}

    @functools.cache
    def counted(*changes: tuple[str, float]) -> int:
        return formula.count(sites, n_params, {**given, **sizes, **dict(changes)})

    def count(changes: Mapping[str, float]) -> int:
        try:
            return counted(*sorted(changes.items()))
        except NameError as error:  # a formula with a number that only the run itself finds
            reason = f"has no count in closed form ({error.name} is known to the run alone)"
            raise InputError(f"method={formula.name}: {reason}") from error

    return count


def dimensions(method: Mapping, count: Count) -> dict[str, int | float]:
    """Return the dimensions of a method with their present values."""
    searched = [key.partition(".")[2] for key in method["search"] if key.startswith("method.")]
    positive = {
        name: method[name]
        for name in searched
        if isinstance(method[name], int | float) and method[name] > 0  # -1: chosen per site
    }
    here = count({})
    return {name: v for name, v in positive.items() if count({name: _scaled(v, 1)}) != here}


def model_sizes(net: nn.Module) -> dict[str, int]:
    """Numbers of a model that the closed form of a count may name, told by its tensors' names."""
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    norms = {name: size for name, size in sizes.items() if "norm" in name or "ln_" in name}
    return {
        "n_hidden": net.get_parameter(_first(sizes, "embed", "wte")).shape[1],
        "n_block": sum(size for name, size in sizes.items() if ".0." in name),
        "n_norms": sum(norms.values()),
        "n_norm_biases": sum(size for name, size in norms.items() if name.endswith(".bias")),
        "n_final_norm": sum(
            size for name, size in norms.items() if ".norm." in name or "ln_f." in name
        ),
    }


def _first(sizes: Mapping[str, int], *words: str) -> str:
    return next(name for name in sizes if any(word in name for word in words))


def _key(model: Mapping) -> tuple[Path, str]:
    return locate(model)[0], json.dumps(dict(model), sort_keys=True)


@functools.lru_cache(maxsize=4)
def _skeleton(folder: Path, model: str) -> PreTrainedModel:
    """Build the model of a folder on the meta device: shapes without memory."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        net = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        conv1d_to_linear(net)
    return net.requires_grad_(False)


def _search(
    count: Count, start: Mapping[str, int | float], budget: int, tolerance: float
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Return all candidates within the tolerance, most even first, and the nearest of any."""
    if not start:
        return ([{}] if _off(count({}), budget) <= tolerance else []), {}
    first, *rest = start
    middle = _bisect(lambda x: count({k: _scaled(v, x) for k, v in start.items()}), budget)
    sizes = {  # of the other dimensions: scaled alike, and rounded down or up
        values
        for step in range(-2 * STEPS, 2 * STEPS + 1)
        for values in itertools.product(*(_both(start[n], middle + step / STEPS) for n in rest))
    }
    candidates: list[dict[str, float]] = []
    for values in sorted(sizes):
        others = dict(zip(rest, values, strict=True))
        octaves = _bisect(partial(_count_at, count, others, first, start[first]), budget)
        for value in _around(start[first], octaves):
            candidate = {first: value, **others}
            if candidate not in candidates:
                candidates.append(candidate)
    within = [c for c in candidates if _off(count(c), budget) <= tolerance]
    within.sort(key=lambda c: (_unevenness(c, start), _off(count(c), budget)))
    return within, min(candidates, key=lambda c: _off(count(c), budget))


def _count_at(
    count: Count, others: Mapping[str, float], name: str, value: int | float, octaves: float
) -> int:
    return count({**others, name: _scaled(value, octaves)})


def _bisect(count_at: Callable[[float], int], budget: int) -> float:
    """Return the octaves by which a monotone count crosses the budget, or the nearer end."""
    low, high = -float(OCTAVES), float(OCTAVES)
    falling = count_at(high) < count_at(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if (count_at(middle) < budget) != falling:
            low = middle
        else:
            high = middle
    return high


def _scaled(value: int | float, octaves: float) -> int | float:
    scaled = value * 2**octaves
    return max(1, round(scaled)) if isinstance(value, int) else scaled


def _both(value: int | float, octaves: float) -> tuple[int | float, ...]:
    exact = value * 2**octaves
    whole = isinstance(value, int)
    return (max(1, math.floor(exact)), max(1, math.ceil(exact))) if whole else (exact,)


def _around(value: int | float, octaves: float) -> list[int | float]:
    exact = value * 2**octaves
    if isinstance(value, float):
        return [exact]
    return sorted({max(1, math.floor(exact) + n) for n in (-1, 0, 1, 2)})


def _off(count: int, budget: int) -> float:
    return abs(count - budget) / budget


def _unevenness(candidate: Mapping[str, float], start: Mapping[str, float]) -> float:
    return sum(math.log(candidate[name] / start[name]) ** 2 for name in start)


def _show(changes: Mapping[str, float]) -> str:
    return ", ".join(f"{k}={v if isinstance(v, int) else f'{v:.4g}'}" for k, v in changes.items())

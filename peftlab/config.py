"""The resolved config: its checks, its identity, and the folders of the package's own YAML."""

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peftlab.errors import InputError, require

PACKAGE = Path(__file__).parent
# In a checkout conf/ and sweeps/ lie beside the package, in a wheel inside it.
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent

# Keys that `+key=value` could add in vain; the other groups go to constructors, which refuse them.
KEYS = {
    "": (
        *("model", "method", "optimizer", "dataset", "tracking"),
        *("epochs", "seed", "precision", "batch", "micro_batch", "threads", "compile"),
        *("skip_finished", "study", "objective", "aux", "output"),
    ),
    "model": (
        *("name", "source", "path", "revision", "sha256"),
        *("device", "dtype", "quantize", "attention", "kinds"),
    ),
}
GROUPS = ("model", "method")  # that a count of parameters depends on
# What does not change the numbers of a run, and so is no part of its identity.
NOT_IDENTITY = (
    *("tracking", "threads", "skip_finished", "study", "objective", "aux", "output", "hydra"),
)
# What a sweep may optimise, and its place in result.json: nothing of the test split.
OBJECTIVES = {
    "train_bits_per_token": "final",
    "train_bits_per_byte": "final",
    "trainable_params": "method",
    "train_seconds": "cost",
    "peak_memory_bytes": "cost",
}


def resolve(config: DictConfig) -> dict:
    """Return the config as plain dicts, all interpolations and `precision: auto` resolved.

    Raises: InputError if a resolver of ours refuses what it is given.
    """
    bare = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        resolved = OmegaConf.to_container(bare, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise refusal(error) or error from error
    assert isinstance(resolved, dict)
    if resolved["precision"] == "auto":
        from peftlab.backbone import fast_bf16, resolve_device

        bf16 = fast_bf16(resolve_device(resolved["model"]["device"]))
        resolved["precision"] = "bf16" if bf16 else "fp32"
    return resolved


def refusal(error: BaseException | None) -> InputError | None:
    """Return the InputError that OmegaConf or Hydra has wrapped in errors of its own, if any."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


def run_id(resolved: Mapping) -> str:
    """Sha256 of what decides the numbers of a run, in hexadecimal."""
    identity = {key: value for key, value in resolved.items() if key not in NOT_IDENTITY}
    identity["method"] = {k: v for k, v in identity["method"].items() if k != "search"}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def method_name(method: Mapping) -> str:
    """Return the method's name: that of its file, of its YAML and on the command line."""
    return method["_target_"].split(".")[-2]


def run_name(resolved: Mapping) -> str:
    """Return a folder name that tells model, method and data, and is unique to the config."""
    what = (resolved["model"]["name"], method_name(resolved["method"]), resolved["dataset"]["name"])
    return "-".join((*what, run_id(resolved)[:8]))


def register_resolvers() -> None:
    """Make the resolvers ${peftlab_...:} that config files use known to OmegaConf."""
    OmegaConf.register_new_resolver("peftlab_home", lambda: str(HOME), replace=True)
    OmegaConf.register_new_resolver(
        "peftlab_method", lambda *, _root_: method_name(_root_.method), replace=True
    )
    OmegaConf.register_new_resolver("peftlab_power", power, replace=True)
    OmegaConf.register_new_resolver(
        "peftlab_first", lambda *values: next(v for v in values if v is not None), replace=True
    )
    OmegaConf.register_new_resolver("peftlab_dimensions", _dimensions, replace=True)
    OmegaConf.register_new_resolver("peftlab_dimension", _dimension, replace=True)
    OmegaConf.register_new_resolver(
        "peftlab_run_name", lambda *, _root_: run_name(resolve(_root_)), replace=True
    )


def power(base: float, exponent: float | str, factor: float | str = 1.0) -> float:
    """Return factor · base^exponent: how a sweep ties one number to another.

    `-${x}` reaches a resolver as text, hence the types.
    """
    return float(factor) * float(base) ** float(exponent)


def _dimensions(budget: int, tolerance: float = 0.02, *, _root_: DictConfig) -> dict:
    """${peftlab_dimensions:BUDGET}: {method.rank: 12}, for hydra.sweeper.fixed."""
    if OmegaConf.select(_root_, "hydra.sweeper.arms") is not None:
        return {}  # Hydra resolves the whole sweeper's settings; each arm asks for itself
    from peftlab.budget import solve

    found = solve(*_model_and_method(_root_), budget, tolerance)
    return {f"method.{name}": value for name, value in found.items()}


def _dimension(
    name: str, budget: int, tolerance: float = 0.02, *, _root_: DictConfig
) -> int | float:
    """${peftlab_dimension:rank,BUDGET}: that one dimension, as a value of method.rank itself."""
    from peftlab.budget import solve_one

    without = copy.deepcopy(_root_)
    default = yaml.safe_load((HOME / f"conf/method/{method_name(_root_.method)}.yaml").read_text())
    OmegaConf.update(without, f"method.{name}", default.get(name))
    return solve_one(*_model_and_method(without), name, budget, tolerance)


def _model_and_method(root: DictConfig) -> tuple[dict, dict]:
    model, method = (OmegaConf.to_container(root[group], resolve=True) for group in GROUPS)
    assert isinstance(model, dict) and isinstance(method, dict)
    return model, method


def check(resolved: Mapping) -> None:
    """Check every number and word that run.py itself uses; parts check their own.

    Raises: InputError naming the key, the value and what is allowed.
    """
    for group, keys in KEYS.items():
        for key in resolved[group] if group else resolved:
            where = f"{group}.{key}" if group else key
            allowed = f"no such key; {group or 'the config'} has {', '.join(keys)}"
            require(key in keys, where, (resolved[group] if group else resolved)[key], allowed)
    at_least(resolved, "epochs", 1)
    at_least(resolved, "seed", 0)
    at_least(resolved, "batch", 1)
    at_least(resolved, "micro_batch", 1)
    micro, batch = resolved["micro_batch"], resolved["batch"]
    require(micro <= batch, "micro_batch", micro, f"at most batch ({batch})")
    if resolved["threads"] is not None:
        at_least(resolved, "threads", 1)
    one_of(resolved, "precision", ("fp32", "bf16"))
    one_of(resolved, "compile", ("auto", True, False))
    one_of(resolved, "skip_finished", (True, False))
    names = resolved["objective"]
    for name in [names] if isinstance(names, str) else names:
        one_of({"objective": name}, "objective", tuple(OBJECTIVES))
    optimizer = {f"optimizer.{key}": value for key, value in resolved["optimizer"].items()}
    number(optimizer, "optimizer.lr", above=0)
    number(optimizer, "optimizer.weight_decay", least=0)
    number(optimizer, "optimizer.warmup", least=0, below=1)
    one_of(optimizer, "optimizer.schedule", ("cosine", "linear", "constant"))
    if optimizer["optimizer.clip"] is not None:
        number(optimizer, "optimizer.clip", above=0)


def at_least(values: Mapping, key: str, least: int) -> None:
    """Require a whole number from `least`."""
    value = values[key]
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= least, key, value, f"a whole number, at least {least}")


def one_of(values: Mapping, key: str, allowed: tuple) -> None:
    """Require one of the allowed words."""
    words = ", ".join(str(word).lower() if isinstance(word, bool) else word for word in allowed)
    require(values[key] in allowed, key, values[key], f"one of {words}")


def number(
    values: Mapping,
    key: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Require a finite number in the given range."""
    value = values[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    ranges = [
        f"{word} {bound:g}"
        for word, bound in (("above", above), ("at least", least), ("below", below))
        if math.isfinite(bound)
    ]
    fits = is_number and math.isfinite(value) and value > above and least <= value < below
    require(
        fits, key, value, " and ".join(["a number", *ranges]).replace("number and", "number", 1)
    )

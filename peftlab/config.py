"""The resolved config: its checks, its identity, and the folders of the package's own YAML."""

import copy
import hashlib
import json
import math
import re
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
        *("reuse_frozen", "skip_finished", "study", "objective", "aux", "output"),
    ),
    "model": (
        *("name", "source", "path", "revision", "sha256"),
        *("device", "dtype", "quantize", "attention", "kinds"),
    ),
}
GROUPS_OF_KEYS = ("model", "method", "optimizer", "dataset", "tracking", "aux")
SCHEDULED = ("lr", "weight_decay", "schedule", "warmup", "clip")  # by run.py, for any optimizer
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

    Raises: InputError if a resolver of ours refuses what it is given, or a value is missing.
    """
    bare = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        resolved = OmegaConf.to_container(bare, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise refusal(error) or InputError(" ".join(str(error).split())) from error
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
    _check_target("method", method)
    return method["_target_"].split(".")[-2]


def run_name(resolved: Mapping) -> str:
    """Return a folder name that tells model, method and data, and is unique to the config.

    Raises: InputError for a config that lacks a part, and for a name that would lead elsewhere.
    """
    _check_shape(resolved)
    for group in ("model", "dataset"):
        check_name(f"{group}.name", resolved[group]["name"])
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
    _check_shape(resolved)
    _check_text(resolved, "")
    for group, keys in KEYS.items():
        for key in resolved[group] if group else resolved:
            where = f"{group}.{key}" if group else key
            allowed = f"no such key; {group or 'the config'} has {', '.join(keys)}"
            require(key in keys, where, (resolved[group] if group else resolved)[key], allowed)
    _check_model(resolved["model"])
    check_name("dataset.name", resolved["dataset"]["name"])
    for part in () if resolved["study"] is None else str(resolved["study"]).split("/"):
        check_name("study", part)  # an arm's is STUDY/ARM
    at_least(resolved, "epochs", 1)
    at_least(resolved, "seed", 0)
    at_least(resolved, "batch", 1)
    at_least(resolved, "micro_batch", 1)
    # The rest of the data set is for data.py; this much the model is asked before it is read.
    at_least(
        {"dataset.block_length": resolved["dataset"]["block_length"]}, "dataset.block_length", 2
    )
    micro, batch = resolved["micro_batch"], resolved["batch"]
    require(micro <= batch, "micro_batch", micro, f"at most batch ({batch})")
    if resolved["threads"] is not None:
        at_least(resolved, "threads", 1)
        require(resolved["threads"] <= 1024, "threads", resolved["threads"], "at most 1024")
    one_of(resolved, "precision", ("fp32", "bf16"))
    one_of(resolved, "compile", ("auto", True, False))
    one_of(resolved, "reuse_frozen", (True, False))
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


def check_name(key: str, value: object) -> None:
    """Require what may be part of a folder's name, and leads nowhere else."""
    fits = isinstance(value, str | int) and re.fullmatch(r"\w[\w+.@ -]*", str(value)) is not None
    require(fits, key, value, "a name of letters, digits and _ + . @ - that begins with one")


def _check_shape(resolved: Mapping) -> None:
    """Require every key of the config, and in each group what all of its files have."""
    for key in KEYS[""]:
        require(key in resolved, key, "nothing", "a key that every config has")
    for group in GROUPS_OF_KEYS:
        value = resolved[group]
        require(isinstance(value, Mapping), group, value, f"the name of a file in conf/{group}")
    for key in KEYS["model"]:
        require(key in resolved["model"], f"model.{key}", "nothing", "a key that every model has")
    for key in ("name", "block_length"):  # the others are for data.py
        found = key in resolved["dataset"]
        require(found, f"dataset.{key}", "nothing", "a key that every data set has")
    require("sites" in resolved["method"], "method.sites", "nothing", "a key that every method has")
    for group in ("method", "optimizer", "tracking"):
        _check_target(group, resolved[group])
    for key in SCHEDULED:
        found = key in resolved["optimizer"]
        require(found, f"optimizer.{key}", "nothing", "a key that every optimizer has")


def _check_text(node: object, key: str) -> None:
    """Require that all keys and texts can be written to a file: an argument may be any bytes."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            _check_text(str(name), key)
            _check_text(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for item in node:
            _check_text(item, key)
    elif isinstance(node, str):
        halves = any("\ud800" <= character <= "\udfff" for character in node)
        require(not halves, key, ascii(node), "text in UTF-8")


def _check_target(group: str, node: Mapping) -> None:
    target = node.get("_target_")
    fits = isinstance(target, str) and re.fullmatch(r"\w+(\.\w+)+", target) is not None
    require(fits, f"{group}._target_", target, "a class, with its module, as in conf/")


def _check_model(model: Mapping) -> None:
    """Require texts where texts belong; a model that is ours stays where ours are."""
    check_name("model.name", model["name"])
    source, path, sha256 = model["source"], model["path"], model["sha256"]
    one_of({"model.source": source}, "model.source", ("package", "bundled", "hub"))
    require(isinstance(path, str) and path != "", "model.path", path, "a text")
    if source != "hub":
        plain = re.fullmatch(r"\w[\w.-]*", path) is not None
        require(plain, "model.path", path, f"a plain name where model.source={source}")
    text = model["revision"] is None or isinstance(model["revision"], str)
    require(text, "model.revision", model["revision"], "null, or a branch, tag or commit")
    hexadecimal = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) is not None
    free = sha256 is None and source != "package"
    require(hexadecimal or free, "model.sha256", sha256, "64 hexadecimal digits, or null")


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

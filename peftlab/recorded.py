"""A finished run read back: its record, and the model it trained, put together again.

Nothing of a record is executed: its config may construct only what our own conf/ names, and
tensors come from safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from peftlab.config import HOME, KEYS, check, run_id
from peftlab.errors import InputError, require
from peftlab.untrusted import load_json, load_yaml

if TYPE_CHECKING:
    from peftlab.backbone import Backbone

RECORDED = ("config.yaml", "result.json", "rows.jsonl")
ADAPTER = "adapter.safetensors"
EXPORTED = "peftlab.json"  # what an exported adapter says about itself
CARRIED = ("model", "method", "precision", "seed", "threads")  # of the config, with the adapter


@dataclass(frozen=True)
class Record:
    """What a completed run has left in its folder."""

    folder: Path
    config: dict[str, Any]  # resolved
    result: dict[str, Any]  # result.json
    rows: list[dict[str, Any]]  # rows.jsonl

    @property
    def run_id(self) -> str:
        """The hash of what decided the run's numbers."""
        return self.result["run_id"]


def read_record(folder: Path) -> Record:
    """Read the completed run of `folder`.

    Raises: InputError for a folder without one, a config that is not that of the result or of
    another version, and a config that would construct anything but what our own conf/ names.
    """
    for name in RECORDED:
        there = (folder / name).is_file()
        require(there, "RUN", folder, f"a run folder: it holds {', '.join(RECORDED)}")
    try:
        config = load_yaml((folder / "config.yaml").read_text())
        result = load_json((folder / "result.json").read_text())
        rows = read_rows(folder / "rows.jsonl")
        status, recorded = result["status"], result["run_id"]
        missing = [key for key in KEYS[""] if key not in config]
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"RUN={folder}: is no record of a run ({reason})") from error
    require(status == "completed", "RUN", folder, f"a completed run; this one is {status}")
    require(not missing, "RUN", folder, f"of another version: config.yaml lacks {missing}")
    _check_targets(config)
    check(config)  # what a run would refuse, such as trust_remote_code
    if run_id(config) != recorded:
        try:
            differs = next(_differing(config, result), "in what result.json has only as a hash")
        except (AttributeError, LookupError, TypeError):  # result.json was edited
            differs = "nor is that one as a run writes it"
        raise InputError(f"RUN={folder}: config.yaml is not that of result.json, {differs}")
    return Record(folder, config, result, rows)


def _differing(config: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a config that are not as in its result, of those that a result repeats."""
    repeated = {
        "seed": result.get("seed"),
        "precision": result.get("provenance", {}).get("precision"),
        **{f"{g}.name": result.get(g, {}).get("name") for g in ("model", "dataset")},
        **{f"method.{k}": v for k, v in result.get("method", {}).get("args", {}).items()},
        **{f"optimizer.{k}": v for k, v in result.get("optimizer", {}).items()},
    }
    for key, recorded in repeated.items():
        group, _, name = key.partition(".")
        found = config[group].get(name) if name else config[group]
        if found != recorded and name != "search":
            yield f"{key} is {found}, was {recorded}"


def read_exported(folder: Path) -> Record:
    """Read an adapter that `peftlab export --to adapter` has written; it has no rows.

    Raises: InputError for a folder without one, or one that would construct anything but what our
    own conf/ names.
    """
    path = folder / EXPORTED
    try:
        about = load_json(path.read_text())
        config, result = about["config"], about["result"]
        missing = [key for key in (*CARRIED, "dataset") if key not in config]
        known = about["form"], result["run_id"], result["model"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: is no exported adapter ({reason})") from error
    require(known[0] == "adapter", "RUN", folder, f"an adapter; this is the form {known[0]}")
    require(not missing, "RUN", folder, f"of another version: {EXPORTED} lacks {missing}")
    _check_targets(config)
    return Record(folder, config, result, [])


def carried(record: Record) -> dict[str, Any]:
    """Return what an adapter has to say about itself, so that `read_exported` can read it."""
    config = {key: record.config[key] for key in CARRIED}
    config["dataset"] = {"block_length": record.config["dataset"]["block_length"]}
    kept = ("run_id", "model", "method", "final", "merge")
    return {"config": config, "result": {key: record.result[key] for key in kept}}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read rows.jsonl."""
    return [load_json(line) for line in path.read_text().splitlines()]


def restore(record: Record, *, base: Path | None = None, trained: bool = True) -> Backbone:
    """Load the run's backbone with its method attached as after training, in eval mode.

    base: a folder with the backbone, if not where the run took it from. trained: false leaves the
    method as it was built from the run's seed, before it saw any training data.
    Raises: InputError if the backbone is not, by its sha256, the one that the run adapted, or if
    the adapter is not that of the run.
    """
    from peftlab.checkpoint import load_adapter
    from peftlab.parts import attach, base_of, method_of

    model = {**record.config["model"], "device": "auto"}  # not where the run was, but here
    if base is not None:
        model |= {"source": "hub", "path": str(base), "sha256": None}
    config = {**record.config, "model": model}
    backbone = base_of(config)
    recorded = record.result["model"]["sha256"]
    same = backbone.sha256 == recorded
    require(
        same, "model.sha256", backbone.sha256, f"that of the base of {record.folder}, {recorded}"
    )
    method = method_of(config, backbone)
    attach(method, backbone)
    if trained:
        path = record.folder / ADAPTER
        found = load_adapter(backbone.net, path).get("run_id")
        require(found == record.run_id, str(path), f"of run {found}", f"of {record.run_id}")
    backbone.net.eval()
    return backbone


def _check_targets(config: Mapping[str, Any]) -> None:
    allowed = allowed_targets()
    for target in _targets(config):
        require(target in allowed, "_target_", target, "a class of peftlab's own conf/")
    for group in ("method", "optimizer"):  # what is constructed would look up an interpolation
        open_ends = "${" in json.dumps(config.get(group), ensure_ascii=False)
        require(not open_ends, group, "${...}", "a resolved config: it holds no interpolation")


def allowed_targets() -> set[str]:
    """Return what a recorded config may construct: the `_target_`s of our own conf/."""
    files = (HOME / "conf").rglob("*.yaml")
    return {target for file in files for target in _targets(yaml.safe_load(file.read_text()))}


def _targets(node: Any) -> Iterator[str]:
    """Yield the values of all keys `_target_`, however deep."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_target_":
                yield str(value)
            else:
                yield from _targets(value)
    elif isinstance(node, list):
        for item in node:
            yield from _targets(item)

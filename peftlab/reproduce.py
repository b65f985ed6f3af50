"""`peftlab reproduce RUN`: run it again from its record, and hold every row against the old one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from peftlab.config import HOME, KEYS, run_id
from peftlab.errors import InputError, require

RECORDED = ("config.yaml", "result.json", "rows.jsonl")
# What may explain another number, in the order in which it is asked for.
CAUSES = (
    ("model", "sha256"),
    ("dataset", "fingerprint"),
    ("provenance", "packages"),
    ("provenance", "git_commit"),
    ("provenance", "dirty"),
    ("provenance", "python"),
    ("provenance", "platform"),
    ("provenance", "cpu"),
    ("provenance", "threads"),
)


def reproduce(folder: Path) -> int:
    """Run the run of `folder` again, elsewhere; return 0 if all rows are equal, else 1.

    Raises: InputError for a folder without a completed run, or a config that is not its own.
    """
    config, old, rows = _read(folder)
    from peftlab.run import run

    with tempfile.TemporaryDirectory() as place:
        again = Path(place) / "run"
        new = run(config, again, trial=old["trial"], job_type="train")
        new_rows = _rows(again / "rows.jsonl")
    difference = first_difference(old, rows, new, new_rows)
    causes = list(differing(old, new))
    if difference is None:
        also = f", although {'; '.join(causes)}" if causes else ""
        print(f"reproduced: {len(rows)} rows and the final losses are equal to the last bit{also}")
        return 0
    print(f"not reproduced: {difference}")
    for cause in causes or ["nothing that is recorded differs"]:
        print(f"  {cause}")
    return 1


def first_difference(
    old: Mapping[str, Any], rows: list[dict], new: Mapping[str, Any], new_rows: list[dict]
) -> str | None:
    """Return what differs first between two results with their rows, or None."""
    for number, (before, after) in enumerate(zip(rows, new_rows, strict=False), 1):
        for key in before:
            if before[key] != after.get(key):
                where = f"row {number} (step {before['step']}, {before['phase']} {before['split']})"
                return f"{where}: {key} is {after.get(key)}, was {before[key]}"
    if len(rows) != len(new_rows):
        return f"{len(new_rows)} rows, were {len(rows)}"
    for part in ("base", "final"):
        for key, value in old[part].items():
            if new[part] is None or new[part][key] != value:
                return f"{part}.{key} is {new[part] and new[part][key]}, was {value}"
    return None


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is recorded of model, data, packages, code and machine, and differs."""
    for group, key in CAUSES:
        before, after = old[group].get(key), new[group].get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            for name in sorted({*before, *after}):
                if before.get(name) != after.get(name):
                    yield f"package {name} is {after.get(name)}, was {before.get(name)}"
        elif before != after:
            yield f"{group}.{key} is {after}, was {before}"


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict]]:
    for name in RECORDED:
        there = (folder / name).is_file()
        require(there, "RUN", folder, f"a run folder: it holds {', '.join(RECORDED)}")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        result = json.loads((folder / "result.json").read_text())
        rows = _rows(folder / "rows.jsonl")
        status, recorded = result["status"], result["run_id"]
        missing = [key for key in KEYS[""] if key not in config]
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"RUN={folder}: is no record of a run ({reason})") from error
    require(status == "completed", "RUN", folder, f"a completed run; this one is {status}")
    require(not missing, "RUN", folder, f"of another version: config.yaml lacks {missing}")
    for target in _targets(config):
        require(target in allowed_targets(), "_target_", target, "a class of peftlab's own conf/")
    require(run_id(config) == recorded, "RUN", folder, "config.yaml is not that of result.json")
    # The result is not to depend on where it goes, but does on how many threads add it up.
    config["tracking"] = {"_target_": "peftlab.tracking.NoTracker"}
    config["threads"] = result["provenance"]["threads"]
    return config, result, rows


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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

"""W&B's offline records as runs: read without a server, from the `.wandb` files alone.

A record knows no sha256 of the model and no fingerprint of the data: their settings stand in for
these, marked so that such runs are never taken for runs whose hashes are known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftlab.config import method_name, run_id
from peftlab.errors import require
from peftlab.report.records import BrokenFile, Found, Record, finite, flatten, record_of, told
from peftlab.wandb_record import NotARecord, messages

STAND_IN = "wb"  # begins what stands in for a hash
NOTE = (
    "W&B records hold no hash of model and data: runs are compared where the settings of both are "
    "equal, apart from those of run folders, and all seeds of a setting count alike"
)


def add_wandb(found: Found, folders: Sequence[Path]) -> None:
    """Add the W&B runs below `folders`, but for those that are there from their run folder.

    Raises: InputError for a folder that is not there.
    """
    known = {record.run_id for record in found.records}
    added = False
    for folder in folders:
        require(folder.is_dir(), "--wandb", folder, "a folder that holds W&B's offline runs")
        for file in sorted(folder.rglob("*.wandb")):
            record = told(found, file, read_wandb, None)
            if record is not None and record.run_id not in known:
                known.add(record.run_id)
                found.records.append(record)
                added = True
    if added:
        found.warnings.append(NOTE)


def read_wandb(file: Path) -> Record:
    """Return the run that a .wandb file records. Raises: OSError, BrokenFile."""
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    about: dict[str, str] = {}
    try:
        for message in messages(file.read_bytes()):
            match message.WhichOneof("record_type"):
                case "run":
                    about = {"name": message.run.display_name, "study": message.run.run_group}
                    config |= _items(message.run.config.update)
                case "config":
                    config |= _items(message.config.update)
                case "summary":
                    summary |= _items(message.summary.update)
                case "history":
                    history.append(_items(message.history.item))
    except NotARecord as error:
        raise BrokenFile(str(error)) from error
    config.pop("_wandb", None)
    if "status" not in summary:
        raise BrokenFile("no status: the run has not ended")
    try:
        result = _result(config, summary, history, about)
        identity = run_id(config)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BrokenFile(f"no run of peftlab ({error!r})") from error
    inside = file.parent.parent.name == "wandb"
    folder = file.parents[2] if inside else file.parent
    record = record_of(
        {**result, "run_id": identity}, flatten(config), folder, lambda: rows(history)
    )
    return replace(record, sweep=result["study"] and f"W&B {result['study']}", in_folder=False)


def rows(history: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Return the lines of rows.jsonl that a history holds, as `read_rows` does."""
    names = {"train/": ("step", "train")}
    names |= {f"epoch/{split}_": ("eval", split) for split in ("train", "test")}
    return [
        {"step": line["step"], "phase": phase, "split": split, "bits_per_token": finite(line[key])}
        for line in history
        for prefix, (phase, split) in names.items()
        if (key := f"{prefix}bits_per_token") in line
    ]


def _items(items: Any) -> dict[str, Any]:
    try:
        return {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
    except json.JSONDecodeError as error:
        raise BrokenFile(f"a value is not JSON ({error})") from error


def _result(config: Mapping, summary: Mapping, history: Sequence[Mapping], about: Mapping) -> dict:
    """Return what result.json would say, as far as W&B knows it."""
    model, data = config["model"], config["dataset"]
    first = {r["split"]: r for r in rows(history) if r["phase"] == "eval" and r["step"] == 0}
    share, n_trained = summary.get("trainable_fraction"), summary["trainable_params"]
    trial = about["name"].removeprefix(f"{about['study']}-").partition("-")[0]
    return {
        "schema": 1,
        "status": summary["status"],
        "study": config["study"],
        "trial": int(trial) if config["study"] and trial.isdigit() else None,
        "seed": config["seed"],
        "model": {
            "name": model["name"] if model["source"] != "hub" else Path(model["path"]).name,
            "sha256": model["sha256"] or _stand_in(model, ("source", "path", "revision")),
            "total_params": round(n_trained / share) if share else None,
        },
        "method": {"name": method_name(config["method"]), "trainable_params": n_trained},
        "dataset": {"name": data["name"], "fingerprint": _stand_in(data, sorted(data))},
        "final": {
            key.removeprefix("final/"): value
            for key, value in summary.items()
            if key.startswith("final/")
        },
        "base": {f"{split}_bits_per_token": row["bits_per_token"] for split, row in first.items()}
        if len(first) == 2
        else None,
        "cost": {k: summary.get(k) for k in ("train_seconds", "peak_memory_bytes", "step_flops")},
        "provenance": {"precision": config["precision"]},
    }


def _stand_in(settings: Mapping, keys: Sequence[str]) -> str:
    text = json.dumps([settings[key] for key in keys], sort_keys=True)
    return STAND_IN + hashlib.sha256(text.encode()).hexdigest()

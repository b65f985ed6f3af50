"""Runs as the report sees them: read from any folders, checked, flattened; broken files are told.

A run folder is any folder with a result.json, however deep: single runs, the trials of a sweep, a
trial's further seeds (`<trial>-seedN`), the arms of a leaderboard.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftlab.config import NOT_IDENTITY
from peftlab.errors import require
from peftlab.untrusted import load_json, load_yaml

STATUSES = ("completed", "diverged", "pruned", "failed")
# Flat keys that do not tell two settings from each other; `seed` tells their runs apart.
NOT_SETTING = (*NOT_IDENTITY, "seed", "method.search")
MERGED = {None: "in place", True: "yes", False: "inexact"}  # by merge.ok of what is mergeable


class BrokenFile(ValueError):
    """A file that is not what its name says; the message is one line, without the file's name."""


@dataclass(frozen=True)
class Record:
    """One run."""

    folder: Path
    schema: int
    status: str  # one of STATUSES
    error: str | None
    run_id: str | None
    sweep: str | None  # what its trial number counts in: a folder, or a group of W&B
    trial: int | None
    seed: int
    model: str
    model_sha256: str
    total_params: int | None
    data: str
    fingerprint: str
    method: str
    trainable_params: int
    stored_bytes: int | None
    merged: str  # yes, in place, inexact, no, or ? where it was not recorded
    train: float | None  # bits per token of the whole split after the last epoch
    test: float | None
    base: tuple[float, float] | None  # train and test bits per token before training
    seconds: float | None
    memory_bytes: int | None
    step_flops: int | None
    precision: str | None
    command: str | None
    config: Mapping[str, Any]  # flat: dotted key -> number, text, bool or None
    rows: Callable[[], list[dict]] = field(repr=False)  # reads rows.jsonl, or W&B's history
    in_folder: bool = True  # whether `folder` holds its files; else only W&B knows it

    @property
    def setting(self) -> str:
        """What two runs share that differ in nothing but the seed."""
        return json.dumps({k: v for k, v in self.config.items() if not _within(k, NOT_SETTING)})

    @property
    def optimizer(self) -> str:
        """The optimizer's name in Python."""
        return str(self.config.get("optimizer._target_")).rpartition(".")[2]


@dataclass
class Found:
    """What the folders hold."""

    records: list[Record]
    warnings: list[str]  # one line each, naming the file
    confirmed: dict[Path, dict[int, set[int]]]  # sweep folder -> trial -> seeds that confirm it
    analyses: list[Path] = field(default_factory=list)  # files that `peftlab analyze` may have left


def read_runs(folders: Sequence[Path]) -> Found:
    """Read all runs below `folders`, each once. Raises: InputError for a folder that is not there.

    A file that cannot be read, or is not what its name says, becomes a warning; the rest is read.
    """
    found = Found([], [], {})
    for folder in folders:
        require(folder.is_dir(), "DIR", folder, "a folder that holds run folders")
    seen: set[Path] = set()
    for path, names in _walk(folders, found.warnings):
        if "optimization_results.yaml" in names:
            file = path / "optimization_results.yaml"
            found.confirmed[path.resolve()] = told(found, file, read_confirmed, {})
        if path.name == "analyses":
            found.analyses += [path / name for name in sorted(names) if name.endswith(".json")]
        if "result.json" in names and path.resolve() not in seen:
            seen.add(path.resolve())
            record = told(found, path / "result.json", lambda f: _read_run(f, found), None)
            if record is not None:
                found.records.append(record)
    return found


def _walk(folders: Sequence[Path], warnings: list[str]) -> Iterator[tuple[Path, set[str]]]:
    """Yield all folders and their files' names; links to folders are not followed."""

    def unreadable(error: OSError) -> None:
        warnings.append(f"{error.filename}: {error.strerror}")

    for folder in folders:
        for path, below, names in os.walk(folder, onerror=unreadable):
            below[:] = sorted(n for n in below if n not in ("wandb", "checkpoint") and n[0] != ".")
            yield Path(path), set(names)


def told(found: Found, file: Path, read: Callable, otherwise: Any) -> Any:
    """Return what `read` makes of the file; if that fails, add a line and return `otherwise`."""
    try:
        return read(file)
    except (OSError, UnicodeDecodeError, RecursionError, BrokenFile) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        found.warnings.append(f"{file}: {' '.join(str(reason).split())}; left out")
        return otherwise


def _read_run(file: Path, found: Found) -> Record:
    result = _json(file.read_text())
    config = told(found, file.with_name("config.yaml"), read_config, None)
    if config is None:  # the result names the most part of it
        args, optimizer = (_get(result, key, dict) for key in ("method.args", "optimizer"))
        config = flatten({"method": args, "optimizer": optimizer})
    return record_of(result, config, file.parent, lambda: read_rows(file.with_name("rows.jsonl")))


def record_of(
    result: Mapping, config: Mapping[str, Any], folder: Path, rows: Callable[[], list[dict]]
) -> Record:
    """Take a result apart. Raises: BrokenFile naming the key that is missing or wrong."""
    status = _get(result, "status", str)
    if status not in STATUSES:
        raise BrokenFile(f"status={status!r:.40}: not one of {', '.join(STATUSES)}")
    final: dict = _get(result, "final", dict) if status == "completed" else {}
    trial = _get(result, "trial", int, None)
    merge = _get(result, "merge", dict, None)
    mergeable = _get(result, "method.mergeable", bool, None)
    base = _get(result, "base", dict, None) or None
    merged = "no" if mergeable is False else "?"
    if mergeable and status == "completed":
        merged = MERGED[None if merge is None else _get(result, "merge.ok", bool)]
    return Record(
        folder=folder,
        schema=_get(result, "schema", int),
        status=status,
        error=_get(result, "error", str, None),
        run_id=_get(result, "run_id", str, None),
        sweep=None if trial is None else str(folder.parent),
        trial=trial,
        seed=_get(result, "seed", int),
        model=_printable(_get(result, "model.name", str)),
        model_sha256=_get(result, "model.sha256", str),
        total_params=_get(result, "model.total_params", int, None),
        data=_printable(_get(result, "dataset.name", str)),
        fingerprint=_get(result, "dataset.fingerprint", str),
        method=_printable(_get(result, "method.name", str)),
        trainable_params=_get(result, "method.trainable_params", int),
        stored_bytes=_get(result, "method.stored_bytes", int, None),
        merged=merged,
        train=_get(final, "train_bits_per_token", float) if final else None,
        test=_get(final, "test_bits_per_token", float) if final else None,
        base=base
        and (
            _get(base, "train_bits_per_token", float),
            _get(base, "test_bits_per_token", float),
        ),
        seconds=_get(result, "cost.train_seconds", float, None),
        memory_bytes=_get(result, "cost.peak_memory_bytes", int, None),
        step_flops=_get(result, "cost.step_flops", int, None),
        precision=_get(result, "provenance.precision", str, None),
        command=_get(result, "provenance.command", str, None),
        config=config,
        rows=rows,
    )


_REQUIRED: Any = object()


def _get(node: Mapping, key: str, kind: type, otherwise: Any = _REQUIRED) -> Any:
    """Return the value at a dotted key, of this kind; None stands for missing.

    Raises: BrokenFile if it is of another kind, or missing without an `otherwise`.
    """
    value: Any = node
    for part in key.split("."):
        if value is None:
            break
        if not isinstance(value, Mapping):
            raise BrokenFile(f"{key}: within something that is no object")
        value = value.get(part)
    if value is None:
        if otherwise is _REQUIRED:
            raise BrokenFile(f"{key}: missing")
        return otherwise
    whole = isinstance(value, bool) == (kind is bool)
    if not (isinstance(value, (int, float) if kind is float else kind) and whole):
        raise BrokenFile(f"{key}={value!r:.40}: not of type {kind.__name__}")
    if kind is float and finite(value) is None:
        raise BrokenFile(f"{key}={value!r:.40}: not finite")
    return value


def _printable(name: str) -> str:
    """Return a name without what would move a terminal's cursor or colour it."""
    return "".join(c if c.isprintable() else "?" for c in name)


def read_rows(file: Path) -> list[dict]:
    """Return the lines of rows.jsonl; a loss that is not finite is None.

    Raises: OSError, BrokenFile.
    """
    rows = [_json(line) for line in file.read_text().splitlines()]
    for row in rows:
        for key, kind in (("phase", str), ("split", str), ("step", int)):
            _get(row, key, kind)
        row["bits_per_token"] = finite(row.get("bits_per_token"))
    return rows


def read_config(file: Path) -> dict[str, Any]:
    """Return config.yaml, flat. Raises: OSError, BrokenFile."""
    return flatten(_yaml(file))


def read_confirmed(file: Path) -> dict[int, set[int]]:
    """Return trial -> seeds of optimization_results.yaml. Raises: OSError, BrokenFile."""
    confirmed = _yaml(file).get("confirmed") or {}
    try:
        return {
            int(trial): {int(seed) for seed in entry["seeds"]} for trial, entry in confirmed.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BrokenFile("confirmed: not trial -> seeds") from error


def flatten(node: Mapping, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> leaf; a list becomes its JSON text, and so does what is not finite."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, str | int) or finite(value) is not None:
            flat[f"{prefix}{key}"] = value
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str)
    return flat


def finite(value: Any) -> float | None:
    """Return a number that is finite, else None: a run that diverges may end with another."""
    try:
        return value if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an integer that no float can hold
        return None


def _json(text: str) -> dict:
    try:
        value = load_json(text)
    except ValueError as error:
        raise BrokenFile(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BrokenFile("not a JSON object")
    return value


def _yaml(file: Path) -> dict:
    try:
        value = load_yaml(file.read_text())
    except ValueError as error:
        raise BrokenFile(f"not YAML ({error})") from error
    if not isinstance(value, dict):
        raise BrokenFile("not a YAML mapping")
    return value


def _within(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)

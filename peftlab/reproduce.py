"""`peftlab reproduce RUN`: run it again from its record, and hold every row against the old one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftlab.recorded import read_record, read_rows

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
    record = read_record(folder)
    old, rows = record.result, record.rows
    from peftlab.run import run

    # The result is not to depend on where it goes, but does on how many threads add it up.
    tracking = {"_target_": "peftlab.tracking.NoTracker"}
    threads = old["provenance"]["threads"]
    config = {**record.config, "tracking": tracking, "threads": threads}

    with tempfile.TemporaryDirectory() as place:
        again = Path(place) / "run"
        new = run(config, again, trial=old["trial"], job_type="train")
        new_rows = read_rows(again / "rows.jsonl")
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

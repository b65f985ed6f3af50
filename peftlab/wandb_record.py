"""A `.wandb` file, W&B's record of a run: what it says, and a copy of it with fewer rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from peftlab.report.offline import BLOCK, FIRST, HEADER, LAST, MIDDLE, START, WHOLE, messages


@dataclass(frozen=True)
class Said:
    """What a record has to tell a server."""

    entity: str | None  # None: the key's own
    project: str
    name: str  # W&B's id of the run
    n_rows: int  # of the run until the last row that is here; its first ones need not be here
    ended: bool


def said(record: Path) -> Said:
    """Read a record as far as it is whole.

    Raises: OSError; ValueError if it is no record, or of no run.
    """
    run, n_rows, ended = None, 0, False
    for message in messages(record.read_bytes()):
        match message.WhichOneof("record_type"):
            case "run":
                run = message.run
            case "history":
                n_rows = max(n_rows, message.history.step.num + 1)
            case "exit":
                ended = True
    if run is None:
        raise ValueError("no run has begun in it")
    return Said(run.entity or None, run.project, run.run_id, n_rows, ended)


def copy_without(n_rows: int, record: Path, target: Path) -> None:
    """Write to `target` what is whole in a record, without the first rows of its run."""
    kept = (
        message.SerializeToString()
        for message in messages(record.read_bytes())
        if message.WhichOneof("record_type") != "history" or message.history.step.num >= n_rows
    )
    target.write_bytes(_log(kept))


def mark(record: Path) -> Path:
    """Return the path of W&B's own marker: the record was uploaded, when it is not older."""
    return record.with_name(record.name + ".synced")


def _log(parts: Iterable[bytes]) -> bytes:
    """Return the file that `messages` reads."""
    log = bytearray(START)
    for part in parts:
        begun = False
        while True:
            left = BLOCK - len(log) % BLOCK
            if left < HEADER.size:
                log += bytes(left)
                continue
            piece, part = part[: left - HEADER.size], part[left - HEADER.size :]
            kind = (MIDDLE if part else LAST) if begun else (FIRST if part else WHOLE)
            log += HEADER.pack(zlib.crc32(piece, zlib.crc32(bytes([kind]))), len(piece), kind)
            log += piece
            begun = True
            if not part:
                break
    return bytes(log)

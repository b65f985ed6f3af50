"""A `.wandb` file, W&B's record of a run: what it says, and a copy of it with fewer rows.

Such a file is a LevelDB log: after 7 bytes of its own come blocks of 32 KiB; in them pieces, each
with a header of 7 bytes (checksum, length, kind); one or several pieces make a protobuf message.
"""

from __future__ import annotations

import contextlib
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START = b":W&B\xe1\xbe\x00"  # name, magic number, version
BLOCK = 32768
HEADER = struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4  # kinds of pieces
WRITTEN_S = 10.0  # in which W&B's process has written what it has; on a busy machine it is late


class NotARecord(ValueError):
    """A file that is no record, or that was changed; the message is one line, without its name."""


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

    Raises: OSError; NotARecord if it is none, or of no run.
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
        raise NotARecord("no run has begun in it")
    return Said(run.entity or None, run.project, run.run_id, n_rows, ended)


def said_in_the_end(record: Path, seconds: float = WRITTEN_S) -> Said:
    """`said`, of a record that W&B's process may still be writing: waits for its end.

    Raises: as `said`, of what is there after so many seconds.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(NotARecord):
            found = said(record)
            if found.ended:
                return found
        time.sleep(0.05)
    return said(record)


def messages(data: bytes) -> Iterator[Any]:
    """Yield the messages of a .wandb file; what a kill has torn at its end is not one.

    Raises: NotARecord if it does not begin as such a file, or a piece was changed.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2 as proto  # 1.4 s to import

    if not data.startswith(START):
        raise NotARecord("not a W&B record")
    at, parts = len(START), b""
    while at + HEADER.size <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER.size:  # the rest of a block that is too short for a header
            at += left
            continue
        checksum, length, kind = HEADER.unpack_from(data, at)
        piece = data[at + HEADER.size : at + HEADER.size + length]
        if len(piece) < length or kind == 0:
            return
        if checksum != zlib.crc32(piece, zlib.crc32(bytes([kind]))):
            raise NotARecord(f"a piece at byte {at} was changed")
        at += HEADER.size + length
        parts = piece if kind in (WHOLE, FIRST) else parts + piece
        if kind in (WHOLE, LAST):
            message = proto.Record()  # pyright: ignore[reportAttributeAccessIssue]
            try:
                message.ParseFromString(parts)
            except DecodeError as error:
                raise NotARecord(f"the message that ends at byte {at} is none of W&B") from error
            yield message


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

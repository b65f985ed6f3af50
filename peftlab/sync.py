"""`peftlab sync`: uploads the W&B records that the server lacks, by W&B's own `wandb sync`."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from peftlab.errors import InputError, require
from peftlab.wandb_record import Said, copy_without, mark, said
from peftlab.wandb_server import (
    NO_ANSWER,
    NOTHING,
    Held,
    answers,
    first_line,
    held,
    key_is_set,
    lacks,
    server,
    without_user,
)

BATCH = 20  # runs per `wandb sync`, which takes 1 s to start
BATCH_TIMEOUT_S = 600  # a server that stops answering would hold it up for ever
ANSWER_TIMEOUT_S = 10
SETTLE_S = 3.0  # W&B's public server counts rows that have come after 2 to 4 s


def sync(folders: Sequence[Path]) -> int:
    """Upload all W&B records below `folders` that the server lacks; return the exit code.

    These are the offline ones, and those of online runs whose end the server has not confirmed,
    such as runs that were killed. Online runs that still go on are left alone. An offline one that
    has grown since its last upload is uploaded again, so this may be called while runs go on; W&B
    shows such a run as failed until it has been uploaded to its end. Prints a line for each.
    Exit code 0: all are uploaded; 1: one at least is not.
    Raises: InputError without an API key, for a folder that does not exist or cannot be written.
    """
    for folder in folders:
        require(folder.is_dir(), "DIR", folder, "a folder that holds run folders")
    if not key_is_set():
        raise InputError("WANDB_API_KEY: not set, and no key in netrc; W&B needs one to upload")
    try:
        return _sync(sorted({path.resolve() for folder in folders for path in _records(folder)}))
    except OSError as error:  # a full disk, folders of others
        raise InputError(f"{error.filename or 'DIR'}: {error.strerror or error}") from error


def _sync(records: Sequence[Path]) -> int:
    pending = [record for record in records if not _is_uploaded(record)]
    going_on = [record for record in pending if _is_online(record) and _goes_on(record)]
    for record in going_on:
        print(f"goes on   {_run_of(record)}", flush=True)
    pending = [record for record in pending if record not in going_on]
    n_uploaded = n_failed = 0
    for start in range(0, len(pending), BATCH):
        for record, outcome in _bring(pending[start : start + BATCH]).items():
            n_uploaded += outcome == "uploaded"
            n_failed += outcome == "failed"
            if outcome != "there":
                print(f"{outcome:8}  {_run_of(record)}", flush=True)
    n_there = len(records) - len(going_on) - n_uploaded - n_failed
    print(f"{n_uploaded} uploaded, {n_there} already there, {n_failed} failed")
    return int(n_failed > 0)


def _records(folder: Path) -> Iterator[Path]:
    for kind in ("run-*", "offline-run-*"):
        yield from folder.rglob(f"wandb/{kind}/run-*.wandb")


def _run_of(record: Path) -> Path:
    """Return the run folder that holds wandb/offline-run-.../run-....wandb."""
    run = record.parents[2]
    return run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run


def _is_online(record: Path) -> bool:
    return record.parent.name.startswith("run-")


def _goes_on(record: Path) -> bool:
    """Whether a process works in the run's folder: it holds the lock, which dies with it."""
    lock = record.parents[2] / ".lock"
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _is_uploaded(record: Path) -> bool:
    """Whether the marker is there, and not older than the data."""
    marker = mark(record)
    return marker.exists() and marker.stat().st_mtime_ns >= record.stat().st_mtime_ns


def _bring(records: Sequence[Path]) -> dict[Path, str]:
    """Bring the records to the server; return `there`, `uploaded` or `failed` for each."""
    outcomes = dict.fromkeys(records, "failed")
    if not answers(server(), ANSWER_TIMEOUT_S):
        print(f"{without_user(server())} does not answer", file=sys.stderr)
        return outcomes
    read, told = {}, {}
    for record in records:
        try:
            read[record], told[record] = record.stat().st_mtime_ns, said(record)
        except (OSError, ValueError) as error:
            _complain(record, f"{record.name} cannot be read ({first_line(error)})")
    there = _ask(told)
    for record in there:
        if _is_online(record) and there[record].has(told[record].n_rows, told[record].ended):
            outcomes[record] = "there"
    sent = _upload({record: there[record] for record in there if outcomes[record] == "failed"})
    for record in sent:
        lack = lacks(told[record])
        if lack is None:
            outcomes[record] = "uploaded"
        else:
            _complain(record, lack)
    for record, outcome in outcomes.items():
        if outcome != "failed":
            mark(record).touch()
            # What was written since it was read is not at the server.
            os.utime(mark(record), ns=(read[record], read[record]))
    return outcomes


def _ask(told: Mapping[Path, Said]) -> dict[Path, Held]:
    """Return what the server holds of each run, without those of which it does not say so."""
    there = _asked_once(told)
    if begun := {record: told[record] for record, run in there.items() if run.n_rows}:
        time.sleep(SETTLE_S)
        there = {record: there[record] for record in there if record not in begun}
        there |= _asked_once(begun)
    return there


def _asked_once(told: Mapping[Path, Said]) -> dict[Path, Held]:
    there = {}
    for record, run in told.items():
        try:
            there[record] = held(run.entity, run.project, run.name) or NOTHING
        except NO_ANSWER as error:
            _complain(record, f"the server does not say what it holds ({first_line(error)})")
    return there


def _upload(there: Mapping[Path, Held]) -> list[Path]:
    """Run `wandb sync` on what the server lacks, and return the records that it calls uploaded.

    W&B adds the rows of a record to those that the server has, whether they are the same or not.
    It exits with 0 in any case; what it did shows in its markers only, and not even there if the
    server has refused it.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("WANDB_SERVICE", "WANDB_MODE")}
    with tempfile.TemporaryDirectory() as scratch:
        copies = {}
        for n, (record, here) in enumerate(there.items()):
            copies[record] = Path(scratch) / f"offline-run-{n}" / record.name
            copies[record].parent.mkdir()
            copy_without(here.n_rows, record, copies[record])
        if not copies:
            return []
        try:
            done = subprocess.run(
                [sys.executable, "-m", "wandb", "sync", *map(str, copies.values())],
                cwd=scratch,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=BATCH_TIMEOUT_S,
            )
            errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        except subprocess.TimeoutExpired:
            errors = [f"wandb sync: not done after {BATCH_TIMEOUT_S} s, ended"]
        for line in errors:
            print(line, file=sys.stderr)
        return [record for record, copy in copies.items() if mark(copy).exists()]


def _complain(record: Path, reason: str) -> None:
    print(f"{_run_of(record)}: {reason}", file=sys.stderr)

"""`peftlab sync`: uploads the W&B runs that were recorded offline, with W&B's own `wandb sync`."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from peftlab.errors import InputError, require
from peftlab.tracking import answers, key_is_set, server, without_user

BATCH = 20  # runs per `wandb sync`, which takes 1 s to start
BATCH_TIMEOUT_S = 600  # a server that stops answering would hold it up for ever
ANSWER_TIMEOUT_S = 10


def sync(folders: Sequence[Path]) -> int:
    """Upload all offline W&B runs below `folders`, print a line for each, return the exit code.

    A run that has grown since its last upload is uploaded again, so this may be called while runs
    go on; W&B shows such a run as failed until it has been uploaded to its end.
    Exit code 0: all are uploaded; 1: one at least is not.
    Raises: InputError without an API key, or for a folder that does not exist.
    """
    for folder in folders:
        require(folder.is_dir(), "DIR", folder, "a folder that holds run folders")
    if not key_is_set():
        raise InputError("WANDB_API_KEY: not set, and no key in netrc; W&B needs one to upload")
    records = sorted({record.resolve() for folder in folders for record in _records(folder)})
    pending = [record for record in records if not _is_uploaded(record)]
    n_failed = 0
    for start in range(0, len(pending), BATCH):
        batch = pending[start : start + BATCH]
        _upload(batch)
        for record in batch:
            uploaded = _is_uploaded(record)
            n_failed += not uploaded
            print(f"{'uploaded' if uploaded else 'failed  '}  {_run_of(record)}", flush=True)
    n_uploaded, n_there = len(pending) - n_failed, len(records) - len(pending)
    print(f"{n_uploaded} uploaded, {n_there} already there, {n_failed} failed")
    return int(n_failed > 0)


def _records(folder: Path) -> Iterator[Path]:
    return folder.rglob("wandb/offline-run-*/run-*.wandb")


def _run_of(record: Path) -> Path:
    """Return the run folder that holds wandb/offline-run-.../run-....wandb."""
    run = record.parents[2]
    return run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run


def _marker(record: Path) -> Path:
    return record.with_name(record.name + ".synced")  # W&B's, written after an upload


def _is_uploaded(record: Path) -> bool:
    """Whether W&B's marker is there, and not older than the data."""
    marker = _marker(record)
    return marker.exists() and marker.stat().st_mtime_ns >= record.stat().st_mtime_ns


def _upload(records: Sequence[Path]) -> None:
    """Run `wandb sync`. What it did shows in its markers only: it exits with 0 in any case."""
    if not answers(server(), ANSWER_TIMEOUT_S):
        print(f"{without_user(server())} does not answer", file=sys.stderr)
        return
    for record in records:
        _marker(record).unlink(missing_ok=True)
    read = {record: record.stat().st_mtime_ns for record in records}
    environment = {k: v for k, v in os.environ.items() if k not in ("WANDB_SERVICE", "WANDB_MODE")}
    try:
        with tempfile.TemporaryDirectory() as scratch:  # for its logs
            done = subprocess.run(
                [sys.executable, "-m", "wandb", "sync", *map(str, records)],
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
    for record in records:
        if _marker(record).exists():  # what was written during the upload is not in it
            os.utime(_marker(record), ns=(read[record], read[record]))
    for line in errors:
        print(line, file=sys.stderr)

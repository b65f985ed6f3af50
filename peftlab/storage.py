"""Where a study lives: a journal file, SQLite or PostgreSQL, opened once per process.

It is the only channel between a sweeper and its trials, wherever these run.
"""

import functools
import os
import re
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy.exc import SQLAlchemyError

from peftlab.errors import InputError

KINDS = "journal:FILE, sqlite:///FILE or postgresql://..."
optuna.logging.set_verbosity(optuna.logging.WARNING)


class KernelLock(BaseJournalFileLock):
    """A lock that ends with its process; Optuna's own ones outlive a kill by half a minute."""

    def __init__(self, path: Path) -> None:
        self.lock = FileLock(path)

    def acquire(self) -> bool:
        """Wait for the lock."""
        self.lock.acquire()
        return True

    def release(self) -> None:
        """Give the lock back."""
        self.lock.release()


def open_storage(url: str, folder: Path) -> BaseStorage:
    """Open the storage `url`; a relative file lies in `folder`. Within a process, always the same.

    Raises: InputError if the storage cannot be opened. The message does not hold the URL, which
    may hold a password.
    """
    kind, _, rest = url.partition(":")
    try:
        if kind == "journal":
            return _journal((folder / rest).resolve())
        if kind in ("sqlite", "postgresql", "postgresql+psycopg"):
            return _database(re.sub("^postgresql:", "postgresql+psycopg:", url))
    except (OSError, SQLAlchemyError, ImportError, optuna.exceptions.OptunaError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"hydra.sweeper.storage: {kind} cannot be opened ({reason})") from error
    raise InputError(f"hydra.sweeper.storage={kind}:...: {KINDS}")


@functools.cache
def _journal(path: Path) -> BaseStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = KernelLock(path.with_name(f".{path.name}.lock"))
    with lock.lock:
        _cut_torn_line(path)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


@functools.cache
def _database(url: str) -> BaseStorage:
    wait = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    return RDBStorage(url, engine_kwargs=wait)


def _cut_torn_line(path: Path) -> None:
    """Drop what a crash of the machine left of the last record; only whole lines count."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
            os.fsync(file.fileno())

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
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from peftlab.errors import InputError

TABLES = 20261122  # number of the lock under which Optuna's tables are made
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
        if kind == "sqlite":
            return _sqlite(url)
        if kind in ("postgresql", "postgresql+psycopg"):
            return _postgresql(re.sub("^postgresql:", "postgresql+psycopg:", url))
    except ImportError as error:
        extra = "needs the extra of its name: pip install 'peftlab[postgresql]'"
        raise InputError(f"hydra.sweeper.storage: {kind} {extra}") from error
    except ValueError as error:  # it names a part of the URL, which may be the password's
        form = "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
        raise InputError(f"hydra.sweeper.storage: not of the form {form}") from error
    except (OSError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
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
def _sqlite(url: str) -> BaseStorage:
    path = Path(url.removeprefix("sqlite:///"))
    with FileLock(path.with_name(f".{path.name}.lock")):  # as below
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})


@functools.cache
def _postgresql(url: str) -> BaseStorage:
    wait = {"connect_timeout": 10}  # seconds; a host that does not answer takes minutes otherwise
    with create_engine(url, connect_args=wait, poolclass=NullPool).begin() as connection:
        # sweepers may start at once, and one has to make the tables before the others look
        connection.execute(text(f"SELECT pg_advisory_xact_lock({TABLES})"))
        return RDBStorage(url, engine_kwargs={"connect_args": wait})


def _cut_torn_line(path: Path) -> None:
    """Drop what a crash of the machine left of the last record; only whole lines count."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
            os.fsync(file.fileno())

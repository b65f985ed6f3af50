"""Where a study lives: a journal file, SQLite or PostgreSQL, opened once per process.

It is the only channel between a sweeper and its trials, wherever these run.
"""

import functools
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import (
    DBAPIError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from peftlab.errors import InputError

TABLES = 20261122  # number of the lock under which Optuna's tables are made
KINDS = "journal:FILE, sqlite:///FILE or postgresql://..."
PATIENCE_S = 600.0  # that a database which answered before may be away
RETRY_S = 1.0
logger = logging.getLogger(__name__)
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


class JournalFile(JournalFileBackend):
    """A journal whose records are whole, also after a disk was full in the middle of one."""

    def __init__(self, path: Path, lock: KernelLock) -> None:
        self.path, self.kernel_lock = path, lock
        super().__init__(str(path), lock_obj=lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records. Raises: OSError, and then none of them is there."""
        with self.kernel_lock.lock:
            _cut_torn_line(self.path)  # by a writer that was killed meanwhile
            size = self.path.stat().st_size
            try:
                super().append_logs(logs)
            except OSError:
                os.truncate(self.path, size)
                raise


def _patient(method: Callable) -> Callable:
    """Try a method of a storage again while its database does not answer."""

    @functools.wraps(method)
    def again(*arguments: Any, **named: Any) -> Any:
        until = time.monotonic() + PATIENCE_S
        told = False
        while True:
            try:
                return method(*arguments, **named)
            except (StorageInternalError, OperationalError) as error:
                if not _is_away(error) or time.monotonic() > until:
                    raise
                if not told:
                    logger.warning("the study's database is away; waiting up to %g s", PATIENCE_S)
                    told = True
                time.sleep(RETRY_S)

    return again


def _is_away(error: BaseException) -> bool:
    """Whether an error means that the server is not there, or was not during a transaction."""
    cause = error if isinstance(error, DBAPIError) else error.__cause__
    if isinstance(cause, PendingRollbackError):  # it went away in the middle of a transaction
        return True
    if not isinstance(cause, DBAPIError):
        return False
    state = getattr(cause.orig, "sqlstate", None)
    refused = isinstance(cause, OperationalError) and state is None  # before there is a session
    return cause.connection_invalidated or refused or str(state).startswith(("08", "57P"))


class PatientStorage(RDBStorage):
    """A database that may be restarted while a sweep goes on: what it has refused is asked again.

    A transaction that was cut off has left nothing behind, so that it can be repeated.
    """


INNER = ("_create_new_trial", "_get_trials")  # that Optuna's cache in front of it calls
for _name, _method in vars(RDBStorage).items():
    if callable(_method) and (_name in INNER or not _name.startswith("_")):
        setattr(PatientStorage, _name, _patient(_method))


def open_storage(url: str, folder: Path, *, wait: bool = False) -> BaseStorage:
    """Open the storage `url`; a relative file lies in `folder`. Within a process, always the same.

    wait: for a database that is away, as long as for one that goes away later.
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
            opened = _patient(_postgresql) if wait else _postgresql
            return opened(re.sub("^postgresql:", "postgresql+psycopg:", url))
    except ImportError as error:
        extra = "needs the extra of its name: pip install 'peftlab[postgresql]'"
        raise InputError(f"hydra.sweeper.storage: {kind} {extra}") from error
    except InputError:
        raise
    except ValueError as error:  # it names a part of the URL, which may be the password's
        form = "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
        raise InputError(f"hydra.sweeper.storage: not of the form {form}") from error
    except (OSError, RuntimeError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        # RuntimeError: tables of another version of Optuna
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"hydra.sweeper.storage: {kind} cannot be opened ({reason})") from error
    raise InputError(f"hydra.sweeper.storage={kind}:...: {KINDS}")


@functools.cache
def _journal(path: Path) -> BaseStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = KernelLock(path.with_name(f".{path.name}.lock"))
    with lock.lock:
        _cut_torn_line(path)
    try:
        return JournalStorage(JournalFile(path, lock))
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        what = f"{path} is damaged, or of another version of Optuna ({error!r:.80})"
        raise InputError(f"hydra.sweeper.storage: journal {what}") from error


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
        # pre_ping: a connection that the server has dropped is replaced before it is used
        kept = {"connect_args": wait, "pool_pre_ping": True}
        return PatientStorage(url, engine_kwargs=kept)


def _cut_torn_line(path: Path) -> None:
    """Drop what a crash of the machine left of the last record; only whole lines count."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            os.fsync(file.fileno())

"""Files on disk: the cache folder, atomic writes, content hashes, and locks between processes."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from peftlab.errors import InputError


def cache_dir() -> Path:
    """Return the cache folder: PEFTLAB_CACHE, or `peftlab` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftlab"
    return Path(os.environ.get("PEFTLAB_CACHE") or default).expanduser().absolute()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file beside `path` to write: it takes its place when the block ends, never a part."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes 0600, useless in a shared folder
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path | None]:
    """Make `folder` once, whole: yields an empty temporary folder to fill, or None if it is there.

    Between processes the first to come fills it and the others wait. When the block ends without
    an error the temporary folder is renamed to `folder`; otherwise it is removed.
    Raises: InputError if the place cannot be written.
    """
    if folder.exists():
        yield None
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        lock.acquire()
    except OSError as error:
        raise InputError(f"PEFTLAB_CACHE={cache_dir()}: cannot be written ({error})") from error
    try:
        if folder.exists():
            yield None
            return
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            yield temporary
            for file in temporary.rglob("*"):  # save_pretrained writes 0600
                file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
            temporary.chmod(0o777 & ~_umask())
            os.replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):  # hashlib.file_digest needs Python 3.11
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

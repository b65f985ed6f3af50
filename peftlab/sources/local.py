"""local: a file or folder of yours, `dataset.path=`.

A file (.jsonl, .json, .csv, .parquet, .txt) is split by the keys test_size and split_seed; a folder
holds train.* and, if you have one, test.* of these formats. UTF-8. JSON is one object a line, or
one array of objects; every cell of a .csv file is a string, as it stands in the file; a line of a
.txt file that is not blank is a row with the field `text`.

The standard library reads all but parquet: the loaders of `datasets` turn 007 into 7 and the words
None and NA into nothing, shift a line with a cell too many, and log over our one line of error.
"""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftlab.errors import InputError, require
from peftlab.files import sha256_of
from peftlab.sources import Row, Rows, refuse


def content_id(dataset: Mapping[str, Any]) -> str:
    """Return the identity of the rows: kind and sha256 of each file.

    Raises: InputError if there is no such file or folder, or its format is unknown.
    """
    refuse(dataset, "subset", "revision", "train_split", "test_split")
    try:
        parts = [f"{path.suffix}{sha256_of(path)}" for path in _files(dataset["path"])]
    except OSError as error:
        raise InputError(f"dataset.path={dataset['path']}: cannot be read ({error})") from error
    return f"local/{'/'.join(parts)}"


def load(dataset: Mapping[str, Any]) -> Rows:
    """Return the rows of the file, or of the folder's files.

    Raises: InputError if a file is not what its name says.
    """
    files = [_read(path) for path in _files(dataset["path"])]
    return Rows(files[0], files[1] if len(files) == 2 else None)


def _files(given: str | None) -> list[Path]:
    """[file] or, for a folder, [train.*] or [train.*, test.*]."""
    require(given is not None, "dataset.path", given, "give a file or a folder")
    path = Path(str(given)).expanduser()
    require(path.exists(), "dataset.path", given, "no such file or folder")
    kinds = ", ".join(READERS)
    if not path.is_dir():
        require(path.suffix in READERS, "dataset.path", given, f"must end in one of {kinds}")
        return [path]
    train, test = (
        sorted(file for file in path.glob(f"{split}.*") if file.suffix in READERS)
        for split in ("train", "test")
    )
    for split, found in (("train", train), ("test", test)):
        names = ", ".join(file.name for file in found)
        require(len(found) < 2, "dataset.path", given, f"more than one {split}.* file: {names}")
    require(bool(train), "dataset.path", given, f"the folder has no train.* file ({kinds})")
    return train + test


def _read(path: Path) -> list[Row]:
    import pyarrow  # only here and below: a warm start reads no rows

    try:
        rows = READERS[path.suffix](path)
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"dataset.path={path}: cannot be read as {path.suffix} ({reason})"
        ) from error
    require(bool(rows), "dataset.path", path, "has no rows")
    return rows


def _json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [
            _json_line(line, number)
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {index} is not an object")
    return rows


def _json_line(line: str, number: int) -> Row:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg}") from error


def _csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        rows = []
        for cells in reader:
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"line {reader.line_num} has {len(cells)} cells, the first line {len(header)}"
                )
            if cells:
                rows.append(dict(zip(header, cells, strict=True)))
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def _txt(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [{"text": line} for line in lines if line.strip()]


READERS = {".jsonl": _json, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}

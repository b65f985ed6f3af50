"""hub: a data set of the Hugging Face hub by name, or a local folder laid out like one.

`dataset.path=` is the name or the folder, `subset` its configuration. Splits are those of the set;
code that comes with a set is never run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from peftlab.errors import InputError, require
from peftlab.files import sha256_of
from peftlab.sources import Row, Rows


def content_id(dataset: Mapping[str, Any]) -> str:
    """Return the identity of the rows: name and revision, or for a folder the sha256 of every file.

    With `revision: null` a name means what it meant when this machine first fetched it: asking
    the hub at each start would need the network, and the run records a fingerprint of the tokens.
    Raises: InputError if no path or no train_split is given.
    """
    path, train_split = dataset["path"], dataset["train_split"]
    require(path is not None, "dataset.path", path, "give a name on the hub, or a folder")
    require(train_split is not None, "dataset.train_split", train_split, "name a split")
    folder = Path(str(path)).expanduser()
    if folder.is_dir():
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        content = [f"{file.relative_to(folder)}:{sha256_of(file)}" for file in files]
    else:
        content = [str(path), str(dataset["revision"])]
    choice = (str(dataset[key]) for key in ("subset", "train_split", "test_split"))
    return "/".join(("hub", *content, *choice))


def load(dataset: Mapping[str, Any]) -> Rows:
    """Return the rows of train_split and of test_split (null: none, the training rows are split).

    Raises: InputError if the hub cannot be reached, or has no such set, subset or split.
    """
    train = _load(dataset, "train_split")
    return Rows(train, None if dataset["test_split"] is None else _load(dataset, "test_split"))


def _load(dataset: Mapping[str, Any], key: str) -> Sequence[Row]:
    import datasets  # seconds to import, and not needed when the tokens are cached
    from datasets.exceptions import DatasetsError

    path, subset = str(dataset["path"]), dataset["subset"]
    folder = Path(path).expanduser()
    try:
        loaded = datasets.load_dataset(
            str(folder) if folder.is_dir() else path,
            name=None if subset is None else str(subset),  # 2020 is a name too
            revision=dataset["revision"],
            split=dataset[key],
        )
    # RuntimeError: a set that wants to run code. OSError: among others, no network.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        asked = f"{subset or 'default subset'}, {key} {dataset[key]}"
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"dataset.path={path}: {asked} cannot be loaded ({reason})") from error
    return cast(Sequence[Row], loaded)

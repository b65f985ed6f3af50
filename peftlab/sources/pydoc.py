"""pydoc: chapters of the Python language reference, from the standard library of this Python.

Fields: topic, text. The text changes with the version of Python, and the identity with it.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftlab.errors import InputError
from peftlab.files import sha256_of
from peftlab.sources import Rows, refuse


def content_id(dataset: Mapping[str, Any]) -> str:
    """Return the identity of the rows: the sha256 of the module that holds them.

    Raises: InputError if this Python was packaged without it, as some are.
    """
    refuse(dataset, "path", "subset", "revision", "train_split", "test_split")
    found = importlib.util.find_spec("pydoc_data.topics")
    if found is None or found.origin is None:
        raise InputError("dataset.source=pydoc: this Python lacks pydoc_data; take another set")
    return f"pydoc/{sha256_of(Path(found.origin))}"


def load(dataset: Mapping[str, Any]) -> Rows:
    """Return all topics, alphabetically."""
    from pydoc_data.topics import topics  # half a megabyte, and absent from some Pythons

    return Rows([{"topic": topic, "text": topics[topic]} for topic in sorted(topics)], None)

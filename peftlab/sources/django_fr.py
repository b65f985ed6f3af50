"""django_fr: a message of the Django web framework in English -> in French.

Fields: english, french. Messages of one line and more than eight characters; plural forms,
messages with a context, and unchecked ("fuzzy") or obsolete translations are left out.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

from peftlab.sources import Rows, open_wheel, packaged_id, read_text

VERSION = 1  # raise it whenever the rows change
CATALOGUE = "/locale/fr/LC_MESSAGES/django.po"
# In a .po file a message is a keyword and one or more quoted strings, which are joined.
ENTRY = re.compile(r'msgid ((?:"[^\n]*"\n)+)msgstr ((?:"[^\n]*"\n)+)')


def content_id(dataset: Mapping[str, Any]) -> str:
    """Return the identity of the rows."""
    return packaged_id(dataset, "django_fr", VERSION)


def load(dataset: Mapping[str, Any]) -> Rows:
    """Return each English message once, in the order of the catalogues."""
    french = {}
    with open_wheel("django_fr") as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(CATALOGUE)):
            for english, translation in _messages(read_text(archive, name)):
                french.setdefault(english, translation)
    return Rows([{"english": source, "french": target} for source, target in french.items()], None)


def _messages(catalogue: str) -> Iterator[tuple[str, str]]:
    for block in catalogue.split("\n\n"):
        entry = ENTRY.search(block.rstrip("\n") + "\n")
        if entry is None or "#, fuzzy" in block or "msgctxt" in block:
            continue
        english, french = (
            "".join(ast.literal_eval(line) for line in part.splitlines()) for part in entry.groups()
        )
        if len(english) > 8 and "\n" not in english and french:
            yield english, french

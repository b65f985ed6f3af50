"""chatterbot: a remark -> a reply, from the English dialogues of chatterbot-corpus.

Fields: question, answer. A dialogue of n utterances gives n - 1 rows; repeated rows are dropped
(one file repeats ten pairs a hundred times).
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import yaml

from peftlab.sources import Rows, open_wheel, packaged_id, read_text

VERSION = 1  # raise it whenever the rows change
FOLDER = "chatterbot_corpus/data/english/"


def content_id(dataset: Mapping[str, Any]) -> str:
    """Return the identity of the rows."""
    return packaged_id(dataset, "chatterbot", VERSION)


def load(dataset: Mapping[str, Any]) -> Rows:
    """Return all pairs once, in the order of the files."""
    pairs: dict[tuple[str, str], None] = {}  # a set that keeps its order
    with open_wheel("chatterbot") as archive:
        names = [name for name in archive.namelist() if name.startswith(FOLDER)]
        for name in sorted(name for name in names if name.endswith(".yml")):
            for dialogue in yaml.safe_load(read_text(archive, name))["conversations"]:
                if isinstance(dialogue, list):  # a few are one sentence, with nobody to reply
                    # YAML reads a bare 42 or yes as no string
                    pairs.update(dict.fromkeys(pairwise(str(said).strip() for said in dialogue)))
    return Rows([{"question": question, "answer": answer} for question, answer in pairs], None)

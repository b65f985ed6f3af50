"""Which methods the seeds can tell apart.

Rule: Welch's t-test between the train losses of two methods over their seeds, two-sided; Holm's
correction over all pairs of the table, so that with probability 95 % no pair is called different
by chance alone. Methods that share a letter are not separated.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean, variance
from string import ascii_lowercase

ALPHA = 0.05
RULE = (
    "Methods that share a letter are not separated by their seeds (Welch's t-test on the train "
    f"losses, Holm's correction over all pairs, {ALPHA:.0%} in all). A range of places stands for "
    "letters where they would be too many: behind all methods that are certainly better, before "
    "all that are certainly worse."
)
MOST_LETTERS = 8  # in a table
UNTESTED = "-"  # in place of letters: one seed cannot be separated from anything


def tie_groups(values: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Return name -> letters, a for the lowest mean; two names that share one are a tie.

    With more than MOST_LETTERS: name -> the places that it may have, "2-5".
    values: one number per seed; a name with fewer than two gets UNTESTED.
    """
    tested = sorted((n for n in values if len(values[n]) > 1), key=lambda n: fmean(values[n]))
    p = {pair: welch(values[pair[0]], values[pair[1]]) for pair in combinations(tested, 2)}
    apart = rejected(p)
    told = _letters(tested, apart) or _places(tested, apart)
    return {name: told.get(name, UNTESTED) for name in values}


def _letters(names: Sequence[str], apart: set[tuple[str, str]]) -> dict[str, str] | None:
    """Return the letters of names, best first, or None if there are too many."""
    groups = _maximal(names, apart)
    if len(groups) > MOST_LETTERS:
        return None
    groups.sort(key=lambda group: [names.index(name) for name in names if name in group])
    letters = dict.fromkeys(names, "")
    for letter, group in zip(ascii_lowercase, groups, strict=False):
        for name in group:
            letters[name] += letter
    return letters


def _places(names: Sequence[str], apart: set[tuple[str, str]]) -> dict[str, str]:
    """Return the places that are left for names, best first."""
    better = Counter(worse for _, worse in apart)
    worse = Counter(better for better, _ in apart)
    places = ((name, 1 + better[name], len(names) - worse[name]) for name in names)
    return {name: str(a) if a == b else f"{a}-{b}" for name, a, b in places}


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of Welch's t-test; each sample has at least two values."""
    from scipy.special import stdtr  # 0.5 s to import: only where there are seeds

    parts = [variance(sample) / len(sample) for sample in (a, b)]
    distance = abs(fmean(a) - fmean(b))
    if sum(parts) == 0:
        return float(distance == 0)
    weights = [part**2 / (len(sample) - 1) for part, sample in zip(parts, (a, b), strict=True)]
    freedom = sum(parts) ** 2 / sum(weights)
    return 2 * float(stdtr(freedom, -distance / math.sqrt(sum(parts))))


def rejected(p: Mapping[tuple[str, str], float]) -> set[tuple[str, str]]:
    """Return the pairs that differ, by Holm's step-down procedure at ALPHA."""
    found: set[tuple[str, str]] = set()
    for n, pair in enumerate(sorted(p, key=lambda pair: p[pair])):
        if p[pair] > ALPHA / (len(p) - n):
            break
        found.add(pair)
    return found


def _maximal(names: Sequence[str], apart: set[tuple[str, str]]) -> list[frozenset[str]]:
    """Return the largest sets of which no two members are apart (Piepho 2004: insert, absorb)."""
    groups = [frozenset(names)] if names else []
    for a, b in sorted(apart):
        split = [group for group in groups if a in group and b in group]
        groups = [group for group in groups if group not in split]
        for candidate in sorted((g - {x} for g in split for x in (a, b)), key=len, reverse=True):
            if not any(candidate <= group for group in groups):
                groups.append(candidate)
    return groups

"""Which rows train and which test: a pure function of the sizes, split_by and split_seed.

Candidates are shuffled by Python's random.Random(split_seed) and the first ones taken. So a smaller
training set is a part of a larger one, and the test set does not depend on train_size. A test_size
that is a fraction is the share of rows to hold out where there is no test split; where there is
one, all of it is used.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.errors import require
from peftlab.sources import Row, Rows, field

HELD_OUT = 0.2  # least share of the values of `split_by` that is held out for the test


def choose(
    rows: Rows, dataset: Mapping[str, Any]
) -> tuple[list[tuple[int, Row]], list[tuple[int, Row]]]:
    """Return the rows of train and test in the source's order, each with its index there.

    Reads the keys train_size, test_size, split_by and split_seed, and expects them checked.
    Raises: InputError if a split is empty, or smaller than asked for, or cannot be made so.
    """
    generator = random.Random(dataset["split_seed"])
    test_size, split_by = dataset["test_size"], dataset["split_by"]
    n = len(rows.train)
    if rows.test is None:
        none = "give one: the data set has no test split"
        require(test_size is not None, "dataset.test_size", None, none)
        wanted = round(test_size * n) if isinstance(test_size, float) else test_size
        require(wanted > 0, "dataset.test_size", test_size, f"of {n} rows that is none")
        train, test = _hold_out(rows.train, wanted, split_by, generator)
        test_rows = rows.train
    else:
        own = "must be null: the data set has its own test split"
        require(split_by is None, "dataset.split_by", split_by, own)
        train, test = list(range(n)), list(range(len(rows.test)))
        generator.shuffle(train)
        generator.shuffle(test)
        wanted = None if isinstance(test_size, float) else test_size
        test_rows = rows.test
    return (
        [(index, rows.train[index]) for index in _take("train", train, dataset["train_size"])],
        [(index, test_rows[index]) for index in _take("test", test, wanted)],
    )


def _take(split: str, candidates: list[int], size: int | None) -> list[int]:
    n, key = len(candidates), f"dataset.{split}_size"
    require(n > 0, key, size, f"the {split} split is empty")
    require(size is None or size <= n, key, size, f"only {n} rows are there for {split}")
    return sorted(candidates[:size])


def _hold_out(
    rows: Sequence[Row], wanted: int, split_by: str | None, generator: random.Random
) -> tuple[list[int], list[int]]:
    """Return shuffled candidates for train and test, `wanted` of them or more for the test.

    With split_by no value of that field is on both sides, and at least HELD_OUT of its values are
    held out, so that a small test set is not about two or three of them.
    """
    if split_by is None:
        order = list(range(len(rows)))
        generator.shuffle(order)
        return order[wanted:], order[:wanted]
    by_value: dict[object, list[int]] = {}
    for index, row in enumerate(rows):
        value = field(row, split_by, f"dataset.split_by={split_by}", f"row {index}")
        by_value.setdefault(value, []).append(index)
    groups = list(by_value.values())
    generator.shuffle(groups)
    train: list[int] = []
    test: list[int] = []
    for number, group in enumerate(groups):
        held_out = len(test) < wanted or number < HELD_OUT * len(groups)
        (test if held_out else train).extend(group)
    generator.shuffle(train)
    generator.shuffle(test)
    return train, test

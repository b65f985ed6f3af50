"""Which methods the seeds separate: against SciPy's test, and by hand."""

import random
from itertools import combinations

import pytest
from scipy.stats import ttest_ind

from peftlab.report import ties
from peftlab.report.ties import UNTESTED, rejected, tie_groups, welch


def test_welch_is_scipys():
    draw = random.Random(1)
    for _ in range(20):
        a = [draw.gauss(3, 0.1) for _ in range(draw.randint(2, 6))]
        b = [draw.gauss(3.2, 0.3) for _ in range(draw.randint(2, 6))]
        assert welch(a, b) == pytest.approx(ttest_ind(a, b, equal_var=False).pvalue, rel=1e-9)


def test_values_without_spread_are_equal_or_not():
    assert welch([2.0, 2.0], [2.0, 2.0]) == 1
    assert welch([2.0, 2.0], [2.1, 2.1]) == 0


def test_holm_steps_down_and_stops_at_the_first_that_fails():
    # 0.05 / 3 = 0.0167, 0.05 / 2 = 0.025, 0.05 / 1: the second fails, so the third may not pass
    assert rejected({("a", "b"): 0.01, ("a", "c"): 0.03, ("b", "c"): 0.04}) == {("a", "b")}
    assert rejected({("a", "b"): 0.01, ("a", "c"): 0.02, ("b", "c"): 0.04}) == {
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    }
    assert rejected({("a", "b"): 0.02, ("a", "c"): 0.02, ("b", "c"): 0.02}) == set()


def test_letters_go_by_the_mean_and_one_seed_is_untested():
    groups = tie_groups(
        {
            "far": [5.00, 5.01, 5.02],
            "best": [3.00, 3.01, 3.02],
            "near": [3.01, 3.02, 3.00],
            "single": [1.0],
        }
    )
    assert groups == {"best": "a", "near": "a", "far": "b", "single": UNTESTED}


def test_a_method_between_two_shares_a_letter_with_each(monkeypatch):
    apart = {("low", "high")}
    monkeypatch.setattr(ties, "rejected", lambda p: apart)
    groups = tie_groups({"low": [1, 1.1], "middle": [2, 2.1], "high": [3, 3.1]})
    assert groups == {"low": "a", "middle": "ab", "high": "b"}


def test_too_many_letters_become_the_places_that_are_left(monkeypatch):
    names = [f"m{n}" for n in range(20)]
    far = {(a, b) for i, a in enumerate(names) for b in names[i + 3 :]}  # 18 groups of three
    monkeypatch.setattr(ties, "rejected", lambda p: far)
    groups = tie_groups({name: [n, n + 0.1] for n, name in enumerate(names)} | {"single": [1.0]})
    assert groups["m0"] == "1-3" and groups["m1"] == "1-4" and groups["m2"] == "1-5"
    assert groups["m10"] == "9-13" and groups["m19"] == "18-20"
    assert groups["single"] == UNTESTED


def test_letters_are_shared_by_exactly_the_pairs_that_are_not_separated(monkeypatch):
    monkeypatch.setattr(ties, "MOST_LETTERS", 26)
    draw = random.Random(2)
    values = {
        f"m{n}": [draw.gauss(3 + n * 0.15, 0.02 + 0.1 * (n % 3)) for _ in range(3)]
        for n in range(14)
    }
    groups = tie_groups(values)
    p = {pair: welch(values[pair[0]], values[pair[1]]) for pair in combinations(values, 2)}
    separated = rejected(p)
    assert 0 < len(separated) < len(p)
    for pair in p:
        shared = set(groups[pair[0]]) & set(groups[pair[1]])
        assert bool(shared) == (pair not in separated), pair

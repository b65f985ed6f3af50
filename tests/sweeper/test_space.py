"""Hydra's grammar becomes Optuna's distributions, and their values Hydra's overrides again."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution as Choice
from optuna.distributions import FloatDistribution as Float
from optuna.distributions import IntDistribution as Int
from optuna.study import create_study

from hydra_plugins.peftlab_sweeper._space import read_space
from peftlab.errors import InputError

READ = {
    "interval(0, 1)": Float(0.0, 1.0),
    "tag(log, interval(1e-5, 1))": Float(1e-5, 1.0, log=True),
    "int(interval(1, 64))": Int(1, 64),
    "tag(log, int(interval(1, 64)))": Int(1, 64, log=True),
    "int(tag(log, interval(1, 64)))": Int(1, 64, log=True),
    "range(1, 10)": Int(1, 9),
    "range(2, 9, 2)": Int(2, 8, step=2),
    "range(2, 10, 3)": Int(2, 8, step=3),
    "range(0, 1, 0.25)": Float(0.0, 0.75, step=0.25),
    "choice(2, 4, 8)": Choice([2, 4, 8]),
    "1,2": Choice([1, 2]),
    "a,b": Choice(["a", "b"]),
    "'1','2'": Choice(["1", "2"]),
    "true,null,1.5": Choice([True, None, 1.5]),
    "choice([q], [q, v])": Choice(["[q]", "[q,v]"]),
    "choice({a: 1}, {a: 2})": Choice(["{a:1}", "{a:2}"]),
}


def space(*words, ranges=(), when=None):
    return read_space(list(words), list(ranges), when or {}, OverridesParser.create())


@pytest.mark.parametrize("text", READ)
def test_distributions(text):
    (parameter,) = space(f"x={text}").parameters
    assert parameter.distribution == READ[text]


def test_values_go_back_into_overrides_that_hydra_reads():
    found = space("method=lora", "x='1','2'", "+y=choice([q],[q,v])", "++z=interval(0,1)", "~w")
    point = {"x": "2", "y": "[q,v]", "z": 1e-7}
    assert found.overrides(point) == ["method=lora", "x='2'", "+y=[q,v]", "++z=1e-07", "~w"]
    read = OverridesParser.create().parse_overrides(found.overrides(point))
    assert [o.value() for o in read[1:4]] == ["2", ["q", "v"], 1e-07]


def test_later_ranges_win_and_a_fixed_value_ends_the_search():
    first, second = {"x": "choice(1, 2)", "y": "choice(1, 2)", "z": "1,2"}, {"y": "choice(3, 4)"}
    found = space("z=5", ranges=[first, second])
    assert {p.name: p.distribution.choices for p in found.parameters} == {"x": (1, 2), "y": (3, 4)}
    assert found.overrides({"x": 1, "y": 4}) == ["x=1", "y=4", "z=5"]


BAD = {
    "x=interval(2, 1)": "low <= high",
    "x=tag(log, interval(0, 1))": "low",
    "x=tag(loog, interval(0, 1))": "the only tag is log",
    "x=interval(0": "not a range in Hydra's grammar",
    "x=range(3, 1)": "x=range(3, 1)",
    "x=tag(log, choice(1, 2))": "only an interval or range",
    "x=interval(0, inf)": "finite",
}


@pytest.mark.parametrize("word", BAD)
def test_bad_ranges_are_named_in_one_line(word):
    with pytest.raises(InputError) as error:
        space(word)
    line = str(error.value)
    assert BAD[word] in line and "x=" in line and "\n" not in line


def test_grid_has_the_last_parameter_fastest():
    points = list(space("a=1,2", "b=x,y,z", "c=7").grid())
    assert [tuple(p.values()) for p in points] == [
        *((1, "x"), (1, "y"), (1, "z")),
        *((2, "x"), (2, "y"), (2, "z")),
    ]
    with pytest.raises(InputError, match=r"b=interval\(0,1\).*grid"):
        list(space("a=1,2", "b=interval(0,1)").grid())


WHEN = {"rank": {"method": ["lora", "dora"]}, "dims": {"method": "dora", "rank": 8}}


def test_a_condition_keeps_a_parameter_away():
    found = space("dims=1,2", "method=lora,dora,ia3", "rank=4,8", when=WHEN)
    points = list(found.grid())
    assert points == [
        {"method": "lora", "rank": 4},
        {"method": "lora", "rank": 8},
        {"method": "dora", "rank": 4},
        {"method": "dora", "rank": 8, "dims": 1},
        {"method": "ia3"},
        {"method": "dora", "rank": 8, "dims": 2},
    ]
    assert all(map(found.contains, points))
    assert not found.contains({"method": "ia3", "rank": 4})
    assert not found.contains({"method": "lora"})
    study = create_study()
    drawn = [found.draw(study.ask()) for _ in range(60)]
    assert all(any(point == known for known in points) for point in drawn)
    assert {"method": "ia3"} in drawn


def test_a_condition_on_what_is_fixed():
    when = {"rank": {"method": "lora"}}
    assert list(space("method=lora", "rank=4,8", when=when).grid()) == [{"rank": 4}, {"rank": 8}]
    assert list(space("method=ia3", "rank=4,8", when=when).grid()) == [{}]


@pytest.mark.parametrize(
    ("when", "text"),
    [
        ({"rnak": {"a": 1}}, "rnak"),
        ({"rank": {"b": 1}}, "neither searched nor given"),
        ({"rank": {"a": 3}}, "must be in a=1,2"),
        ({"rank": "a"}, "{other parameter"),
        ({"rank": {"a": 1}, "a": {"rank": 4}}, "waits for the other"),
    ],
)
def test_bad_conditions(when, text):
    with pytest.raises(InputError, match="hydra.sweeper.when") as error:
        space("a=1,2", "rank=4,8", when=when)
    assert text in str(error.value)

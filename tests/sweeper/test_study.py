"""Suggestions and the storage, without Hydra's jobs: what a study draws, keeps and refuses."""

import json
import os
import subprocess
import sys

import pytest
from optuna.trial import TrialState
from studies import book_of, play, space_of, suggester, value_of

from peftlab.errors import InputError
from peftlab.storage import open_storage

WORDS = ("x=interval(-5,5)", "k=choice(1,2,3,4)", "letter=a,b")
ENQUEUE = [{"x": 2, "letter": "b"}, {"x": 1, "k": 4, "letter": "a"}]


FEW = {"tpe": {"n_startup_trials": 4}, "gp": {"n_startup_trials": 4}}


@pytest.mark.parametrize("sampler", [*("tpe", "random", "gp", "cmaes", "qmc")])
def test_a_study_in_parts_equals_the_whole(sampler, tmp_path):
    space, more = space_of(*WORDS), FEW.get(sampler, {})
    last = 7 if sampler == "gp" else 14  # it takes seconds
    whole = play(tmp_path / "whole", suggester(space, sampler, enqueue=ENQUEUE, **more), last)
    for n in (1, 3, 4, 6, last):
        parts = play(tmp_path / "parts", suggester(space, sampler, enqueue=ENQUEUE, **more), n)
    assert whole == parts
    assert len({json.dumps(point) for point in whole}) == last
    first, second = whole[:2]
    assert (first["x"], first["letter"]) == (2, "b") and first["k"] in (1, 2, 3, 4)
    assert second == ENQUEUE[1]
    other = play(tmp_path / "other", suggester(space, sampler, seed=8, **more), 3)
    assert other != whole[2:5] and other != whole[:3]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_samplers_learn(sampler, tmp_path):
    space = space_of("x=interval(-5,5)", "k=interval(0,10)")
    points = play(tmp_path, suggester(space, sampler, **FEW.get(sampler, {})), 30)
    values = [value_of(point) for point in points]
    assert min(values) < 2 and sum(values[20:]) < sum(values[:10]) / 2


def test_sqlite_gives_the_same_study(tmp_path):
    source = suggester(space_of(*WORDS))
    in_sqlite = play(tmp_path / "a", source, 6, f"sqlite:///{tmp_path}/study.db")
    assert in_sqlite == play(tmp_path / "b", source, 6)


def test_a_space_without_new_points_is_exhausted(tmp_path):
    source = suggester(space_of("x=2", "k=1,2,3"))
    with book_of(tmp_path) as book:
        for _ in range(3):
            book.complete(book.add(source.next(book.study)), [[1.0]])
        assert sorted(t.params["k"] for t in book.trials()) == [1, 2, 3]
        assert source.next(book.study) is None


def test_conditions_hold_for_every_draw(tmp_path):
    space = space_of("x=interval(0,5)", "letter=a,b,c", when={"x": {"letter": "a"}})
    points = play(tmp_path, suggester(space), 25, value=lambda point: len(point))
    assert all(("x" in point) == (point["letter"] == "a") for point in points)
    assert {point["letter"] for point in points} == {"a", "b", "c"}


def test_a_diverged_trial_counts_as_the_worst_where_points_are_drawn(tmp_path):
    source = suggester(space_of("x=interval(-5,5)"))
    with book_of(tmp_path) as book:
        for value in (1.0, float("nan"), 7.0, 3.0, float("inf")):
            book.complete(book.add(source.next(book.study)), [[value]])
        assert [t.user_attrs.get("diverged", False) for t in book.trials()] == [
            *(False, True, False, False, True)
        ]
        assert [t.state.name[0] for t in book.trials()] == ["C", "P", "C", "C", "P"]
        copy = source._copy(source.space, book.study, book.trials()).get_trials()
        assert [t.value for t in copy] == [1.0, 7.0, 7.0, 3.0, 7.0]
        assert {t.state for t in copy} == {TrialState.COMPLETE}


def test_a_narrowed_range_holds_for_new_points(tmp_path):
    play(tmp_path, suggester(space_of(*WORDS)), 12)
    points = play(tmp_path, suggester(space_of("x=interval(0,1)", *WORDS[1:])), 20)
    assert not all(0 <= point["x"] <= 1 for point in points[:12])
    assert all(0 <= point["x"] <= 1 for point in points[12:])


def test_mean_and_spread_over_seeds(tmp_path):
    source = suggester(space_of(*WORDS))
    with book_of(tmp_path) as book:
        book.complete(book.add(source.next(book.study)), [[1.0], [2.0], [6.0]])
        (trial,) = book.trials()
    assert trial.value == 3.0
    assert trial.user_attrs["runs"] == [[1.0], [2.0], [6.0]]
    assert trial.user_attrs["spread"] == [pytest.approx((14 / 3) ** 0.5)]


HOLD = """
import sys
from pathlib import Path
from test_study import *
source = suggester(space_of(*WORDS))
book = book_of(Path(sys.argv[1])).__enter__()
print(book.add(source.next(book.study)), flush=True)
sys.stdin.read()
"""


def test_a_living_sweepers_trials_are_its_own_and_a_dead_ones_go_on(tmp_path):
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    path = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, env=path, text=True, **pipes) as other:
        assert other.stdout.readline() == "0\n"
        source = suggester(space_of(*WORDS))
        with book_of(tmp_path) as book:
            assert book.reclaim() == []
            assert book.add(source.next(book.study)) == 1
            other.kill()
            other.wait()
            assert book.reclaim() == [0]
            assert book.reclaim() == []
            assert [t.state.name for t in book.trials()] == ["RUNNING", "RUNNING"]
    with book_of(tmp_path) as book:  # the first one has left both behind, to go on
        assert [t.state.name for t in book.trials()] == ["WAITING", "WAITING"]
        assert book.reclaim() == [0, 1]


def test_a_record_that_a_crash_tore_is_dropped(tmp_path):
    source = suggester(space_of(*WORDS))
    points = play(tmp_path / "a", source, 3)
    whole = (tmp_path / "a" / "study.journal").read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "study.journal").write_bytes(whole[:-30])  # the last trial's end
    with book_of(tmp_path / "b") as book:
        assert [t.state.name for t in book.trials()] == ["COMPLETE", "COMPLETE", "RUNNING"]
        assert [t.params for t in book.trials()] == points
        assert book.reclaim() == [2]


DIFFERENCES = {
    "x=interval(-5,5) k=choice(1,2,3,4)": "letter: this sweep searches nothing",
    "x=tag(log,interval(1,5)) k=choice(1,2,3,4) letter=a,b": "x: this sweep searches",
    "x=interval(-5,5) k=choice(1,2) letter=a,b": "[1, 2]",
    "x=interval(-5,5) k=choice(1,2,3,4) letter=a,b y=1,2": "y: this sweep searches",
}


@pytest.mark.parametrize("words", DIFFERENCES)
def test_another_space_is_refused_with_the_difference_named(words, tmp_path):
    source = suggester(space_of(*WORDS))
    with book_of(tmp_path) as book:
        book.agree(source.space, {"epochs": 3})
        book.agree(space_of(*words.split()), {"epochs": 4})  # no trial yet
        book.agree(source.space, {"epochs": 3})
        book.complete(book.add(source.next(book.study)), [[1.0]])
        book.agree(space_of("x=interval(0,1)", *WORDS[1:]), {"epochs": 3})  # another range
        with pytest.raises(InputError) as error:
            book.agree(space_of(*words.split()), {"epochs": 3})
        assert DIFFERENCES[words] in str(error.value) and "\n" not in str(error.value)
        with pytest.raises(InputError, match="^epochs: this sweep has 4, the study study 3; "):
            book.agree(source.space, {"epochs": 4})
    with pytest.raises(InputError, match="hydra.sweeper.direction=maximize: .* minimize"):
        book_of(tmp_path, directions=["maximize"])


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("mysql://x", "hydra.sweeper.storage=mysql:...: journal:FILE, sqlite"),
        ("journal:/sys/no/study", "journal cannot be opened"),
        ("sqlite:////sys/no.db", "sqlite cannot be opened"),
    ],
)
def test_storages_that_cannot_be_opened(url, text, tmp_path):
    with pytest.raises(InputError, match="hydra.sweeper.storage") as error:
        open_storage(url, tmp_path)
    assert text in str(error.value) and "\n" not in str(error.value)

"""Ranges grow where the best point lies at their end, as a function of the trials alone."""

import math

import pytest
from optuna.trial import TrialState, create_trial
from studies import book_of, play, space_of, suggester

from hydra_plugins.peftlab_sweeper._study import directions_of
from hydra_plugins.peftlab_sweeper._widen import check_widen, widened
from peftlab.errors import InputError

LR = "lr=tag(log,interval(1e-5,1e-2))"  # three decades, so that 0.3 of them are near an end
MIN, MAX = directions_of(["minimize", "maximize"])


def ends_after(values, decades=1.0, direction=MIN, words=(LR,), name="lr"):
    """Ends of the range after trials {lr: loss}."""
    space = space_of(*words)
    trials = [
        create_trial(value=loss, params={name: at}, distributions=wide(space, name))
        for at, loss in values.items()
    ]
    (parameter,) = widened(space, trials, direction, {name: decades}).parameters
    return parameter.distribution.low, parameter.distribution.high


def wide(space, name):
    (parameter,) = space.parameters
    kind = type(parameter.distribution)
    return {name: kind(1e-9, 1e3, log=parameter.distribution.log)}


GROWN = {
    "inside": ({1e-3: 1.0, 1e-5: 2.0, 1e-2: 3.0}, (1e-5, 1e-2)),
    "no trial": ({}, (1e-5, 1e-2)),
    "near the upper end": ({6e-3: 1.0, 1e-5: 2.0}, (1e-5, 1e-2 * math.sqrt(10))),
    "just not near it": ({4.9e-3: 1.0, 1e-5: 2.0}, (1e-5, 1e-2)),
    "near the grown end": ({2e-2: 1.0}, (1e-5, 1e-1)),
    "never more than asked for": ({9e-2: 1.0}, (1e-5, 1e-1)),
    "near the lower end": ({1.9e-5: 1.0}, (1e-5 / math.sqrt(10), 1e-2)),
    "holds what was tried": ({1e-3: 1.0, 2e-2: 2.0, 4e-6: 3.0}, (4e-6, 2e-2)),
}


@pytest.mark.parametrize("case", GROWN)
def test_ends_by_hand(case):
    values, expected = GROWN[case]
    assert ends_after(values) == pytest.approx(expected, rel=1e-12)


def test_part_of_a_step_another_direction_and_other_scales():
    assert ends_after({2e-2: 1.0}, decades=0.25) == pytest.approx((1e-5, 10**-1.75))
    losses = {9e-3: 1.0, 1.1e-5: 2.0}
    assert ends_after(losses, direction=MAX) == pytest.approx((1e-5 / math.sqrt(10), 1e-2))
    assert ends_after({0.99: 1.0}, words=["x=interval(0,1)"], name="x") == (0, 1)


def test_only_completed_trials_say_where_the_best_is():
    space, at = space_of(LR), {"lr": 9e-3}
    running = create_trial(
        state=TrialState.RUNNING, params=at, distributions=wide(space, "lr"), values=None
    )
    assert widened(space, [running], MIN, {"lr": 1.0}) is space


def test_a_study_goes_beyond_its_range_and_in_parts_equals_the_whole(tmp_path):
    def loss(point):
        return abs(math.log10(point["lr"]) + 1.3)  # best at 0.05, a range ends at 0.01

    def source(**widen):
        made = suggester(space_of(LR, "k=choice(1,2,3)"), n_startup_trials=5)
        made.widen = widen
        return made

    whole = play(tmp_path / "whole", source(lr=1.0), 24, value=loss)
    for n in (5, 6, 13, 24):
        parts = play(tmp_path / "parts", source(lr=1.0), n, value=loss)
    assert whole == parts
    rates = [point["lr"] for point in whole]
    assert max(rates[:5]) <= 1e-2 < max(rates) <= 1e-1
    assert (
        min(map(loss, whole))
        < 0.1
        < min(map(loss, play(tmp_path / "narrow", source(), 24, value=loss)))
    )
    with book_of(tmp_path / "whole") as book:
        kept = [trial.distributions["lr"].high for trial in book.trials()]
    assert kept[0] == 1e-2 and kept[-1] == pytest.approx(1e-1)


BAD = {
    "no such parameter": {"rate": 1},
    "above 0": {"lr": 0},
    "a number above": {"lr": "half"},
    "decades}": [1],
}


@pytest.mark.parametrize("said", BAD)
def test_what_it_cannot_be_is_told_in_one_line(said):
    with pytest.raises(InputError) as error:
        check_widen(BAD[said], space_of(LR, "k=3"), [MIN])
    line = str(error.value)
    assert line.startswith("hydra.sweeper.widen") and said in line and "\n" not in line


def test_several_objectives_are_refused_and_fixed_parameters_stay():
    with pytest.raises(InputError, match="one objective"):
        check_widen({"lr": 1}, space_of(LR), [MIN, MIN])
    assert check_widen({"lr": 1}, space_of("lr=3"), [MIN]) == {"lr": 1.0}
    assert widened(space_of("lr=3"), [], MIN, {"lr": 1.0}).parameters == []

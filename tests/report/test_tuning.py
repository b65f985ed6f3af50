"""Tuning curves, good learning rates and importances, against brute force and planted answers."""

import math
import random
from itertools import combinations

import pytest
from made import make

from peftlab.report.boards import boards_of
from peftlab.report.curves import curve, evenly
from peftlab.report.importance import LEAST_TRIALS, importances, studies_of
from peftlab.report.records import read_runs
from peftlab.report.tuning import best_of, learning_rates, tuning_curve


def one_board(folder):
    ((board,), _) = boards_of(read_runs([folder]))
    return board


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_best_of_k_is_the_quantile_over_all_draws(n, quantile):
    draw = random.Random(n)
    values = [draw.random() for _ in range(n - 1)] + [math.inf]  # one trial did not complete
    for k in range(1, n + 1):
        bests = sorted(min(drawn) for drawn in combinations(values, k))
        expected = next(b for i, b in enumerate(bests, 1) if i / len(bests) >= quantile - 1e-9)
        assert best_of(values, k, quantile) == expected


def test_best_of_many_trials_does_not_overflow():
    values = list(range(5000))
    assert best_of(values, 5000, 0.5) == 0
    assert best_of(values, 1, 0.5) == 2499
    # the median of the best of k uniform draws is near n (1 - 2^(-1/k))
    assert best_of(values, 100, 0.5) == pytest.approx(5000 * (1 - 0.5**0.01), rel=0.05)


def test_the_line_of_one_study_is_in_the_order_tried(tmp_path):
    for trial, train in enumerate((4.0, 5.0, 3.0, 3.5)):
        make(
            tmp_path / "s" / str(trial),
            train=train,
            trial=trial,
            config={"optimizer.lr": 10.0**-trial},
        )
    make(tmp_path / "s" / "4", trial=4, status="pruned", config={"optimizer.lr": 2.0})
    make(tmp_path / "alone", train=1.0, config={"optimizer.lr": 3.0})
    (contender,) = one_board(tmp_path).contenders
    found = tuning_curve(contender)
    assert found.trials == [1, 2, 3, 4, 5]
    assert found.line == [4.0, 4.0, 3.0, 3.0, 3.0]
    assert found.low[0] == 3.0 and found.high[0] is None  # the worst tenth: the pruned trial
    assert found.low[4] == found.high[4] == 3.0
    assert found.line_is == "trials in the order of the study"


def test_several_studies_give_their_median_and_range(tmp_path):
    for study, values in {
        "a": (5.0, 4.0, 3.0),
        "b": (6.0, 2.0, 1.0),
        "c": (4.0, 4.5, 2.5, 9.0),
    }.items():
        for trial, train in enumerate(values):
            lr = {"optimizer.lr": train * 1e-3, "study": study}
            make(tmp_path / study / str(trial), train=train, trial=trial, config=lr)
    (contender,) = one_board(tmp_path).contenders
    found = tuning_curve(contender)
    assert found.trials == [1, 2, 3]
    assert (found.line, found.low, found.high) == ([5, 4, 2.5], [4, 2, 1], [6, 4, 3])
    assert found.line_is == "median of 3 studies"


def test_studies_that_searched_other_things_are_no_repetitions(tmp_path):
    for study, rank in {"a": 4, "b": 16}.items():
        for trial, train in enumerate((5.0, 4.0)):
            more = {"optimizer.lr": 10.0**-trial, "method.rank": rank}
            make(tmp_path / study / str(trial), train=train + rank / 100, trial=trial, config=more)
    (contender,) = one_board(tmp_path).contenders
    found = tuning_curve(contender)
    assert found.trials == [1, 2, 3, 4] and found.line_is.startswith("median over random orders")


def test_good_learning_rates_reach_nearly_all_of_the_improvement(tmp_path):
    # base 6, best 2: good is up to 2 + 0.1 * 4 = 2.4; each rate counts by its best trial
    for n, (lr, train) in enumerate(
        {1e-4: 5.0, 1e-3: 2.4, 3e-3: 2.0, 1e-2: 2.3, 1e-1: 2.5}.items()
    ):
        make(tmp_path / str(n), train=train, config={"optimizer.lr": lr})
    make(tmp_path / "worse", train=5.5, config={"optimizer.lr": 1e-2, "method.rank": 1})
    make(tmp_path / "burst", status="diverged", config={"optimizer.lr": 1.0})
    board = one_board(tmp_path)
    rates = learning_rates(board.contenders[0], board.base[0])
    assert rates.good == (1e-3, 1e-2) and rates.best == 3e-3 and rates.tried == (1e-4, 1.0)
    assert rates.decades == pytest.approx(1.0) and rates.n_trials == 7
    assert learning_rates(board.contenders[0], 2.0) is None  # nothing is better than the base


def test_a_study_tells_which_parameter_mattered(tmp_path):
    draw = random.Random(0)
    for trial in range(40):
        lr, rank = 10 ** draw.uniform(-5, -1), draw.choice([2, 4, 8])
        train = 3 + abs(math.log10(lr) + 3) + 0.001 * rank
        more = {"optimizer.lr": lr, "method.lr": lr, "method.rank": rank}
        make(tmp_path / "s" / str(trial), train=train, trial=trial, config=more, rows=False)
    (study,) = studies_of(one_board(tmp_path))
    scales = {p.name: p.scale for p in study.parameters}
    assert set(scales.values()) == {"log", "linear"} and len(scales) == 2  # lr once, rank
    lr = next(name for name in scales if name.endswith("lr"))
    share = importances(study)
    assert share[lr] > 0.7 and share["method.rank"] < 0.3
    assert sum(share.values()) == pytest.approx(1)


def test_few_trials_have_no_importance(tmp_path):
    for trial in range(LEAST_TRIALS - 1):
        make(
            tmp_path / "s" / str(trial), trial=trial, config={"method.rank": trial + 1}, rows=False
        )
    make(tmp_path / "s" / "99", trial=99, status="pruned", config={"method.rank": 99})
    (study,) = studies_of(one_board(tmp_path))
    assert len(study.trials) == LEAST_TRIALS and importances(study) is None


def test_a_study_over_methods_has_the_method_as_parameter(tmp_path):
    for trial, method in enumerate(("lora", "ia3")):
        default = {"method.lr": 10.0**-trial}  # of the method; the run's own is optimizer.lr
        make(tmp_path / "s" / str(trial), method, trial=trial, config=default)
        make(tmp_path / "s" / f"{trial}-seed1", method, trial=trial, seed=1, config=default)
    (study,) = studies_of(one_board(tmp_path))
    assert [(p.name, sorted(p.values), p.scale) for p in study.parameters] == [
        ("method", ["ia3", "lora"], "category")
    ]


def test_curves_keep_evaluations_and_thin_steps():
    rows = [
        {"phase": "step", "split": "train", "step": n, "bits_per_token": 9 - n / 1000}
        for n in range(1, 1001)
    ]
    rows.append({"phase": "eval", "split": "test", "step": 1000, "bits_per_token": 8.123456})
    rows.append({"phase": "step", "split": "train", "step": 1001, "bits_per_token": None})
    found = curve(rows)
    assert set(found) == {"step", "test"} and found["test"] == [[1000], [8.1235]]
    assert len(found["step"][0]) == 60 and found["step"][0][-1] == 1001
    assert found["step"][1][-1] is None
    assert evenly(range(10), 4) == [1, 4, 6, 9] and evenly([1, 2], 4) == [1, 2]

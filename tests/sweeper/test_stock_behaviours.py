"""What users of the stock Optuna plugin rely on, as far as no other test says it of ours."""

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import FloatDistribution, IntDistribution
from toy import results, sweep, trials

from hydra_plugins.peftlab_sweeper._space import read_space

RANGES = {
    "shuffle(range(1, 3))": IntDistribution(1, 2),
    "range(0.5, 5.5, step=1)": FloatDistribution(0.5, 4.5, step=1.0),  # the end is not included
}


@pytest.mark.parametrize("text", RANGES)
def test_more_distributions(text):
    (parameter,) = read_space([f"x={text}"], [], {}, OverridesParser.create()).parameters
    assert parameter.distribution == RANGES[text]


def test_fixed_added_and_deleted_keys_are_in_every_trial_and_no_parameters(tmp_path):
    words = ("x=choice(0,1,2)", "k=3", "+more=interval(0,1)", "~word")
    sweep(tmp_path, *words, "hydra.sweeper.n_trials=3")
    assert set(results(tmp_path)["best_params"]) == {"x", "more"}
    for trial in trials(tmp_path):
        config = yaml.safe_load((tmp_path / f"{trial.number}/.hydra/config.yaml").read_text())
        assert {key: config[key] for key in ("x", "k", "more")} == {**trial.params, "k": 3}
        assert "word" not in config


def test_settings_on_the_command_line_reach_the_sampler(tmp_path):
    drawn = {}
    for n in (2, 100):
        more = (f"hydra.sweeper.sampler.n_startup_trials={n}", "hydra.sweeper.n_trials=4")
        sweep(tmp_path / str(n), "x=interval(-5,5)", *more)
        drawn[n] = [trial.params for trial in trials(tmp_path / str(n))]
    assert drawn[2][:2] == drawn[100][:2] and drawn[2][2:] != drawn[100][2:]


def test_no_solution_of_several_objectives_dominates_another(tmp_path):
    more = ("what=two", "hydra.sweeper.direction=[minimize,maximize]", "hydra.sweeper.n_trials=8")
    sweep(tmp_path, "x=interval(-5,5)", "k=3", *more)
    points = [(trial.values[0], -trial.values[1]) for trial in trials(tmp_path)]  # both: less

    def dominated(point):
        return any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)

    front = {trial for trial, point in enumerate(points) if not dominated(point)}
    assert {solution["trial"] for solution in results(tmp_path)["solutions"]} == front
    assert 0 < len(front) < len(points)

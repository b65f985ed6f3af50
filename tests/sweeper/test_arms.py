"""Several studies in one sweep: they take turns, fail apart, and each goes on by itself."""

import pytest
from toy import results, states, sweep

from peftlab.errors import InputError

ARMS = ["hydra.sweeper.arms=letter", "letter=a,b"]
N = "hydra.sweeper.n_trials"


def order_of(folder):
    """(letter, trial) of each job, in the order in which they ran."""
    lines = (folder / "log").read_text().splitlines()
    return [(line.split("letter=")[1][0], int(line.split()[0])) for line in lines]


def test_arms_take_turns_and_go_on(tmp_path):
    more = [*ARMS, "x=interval(-5,5)", f"log={tmp_path}/log"]
    sweep(tmp_path, *more, f"{N}=2")
    assert order_of(tmp_path) == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    sweep(tmp_path, *more, f"{N}=3")
    assert order_of(tmp_path)[4:] == [("a", 2), ("b", 2)]
    found = results(tmp_path)
    for arm, each in found["arms"].items():
        assert each == results(tmp_path / arm) and each["n_trials"]["complete"] == 3
        assert each["study_name"] == f"study/{arm}"
    best = min(found["arms"].values(), key=lambda each: each["best_value"])
    assert {k: found[k] for k in ("best_value", "best_params")} == {
        k: best[k] for k in ("best_value", "best_params")
    }


def test_an_arm_that_is_behind_goes_first(tmp_path):
    more = ["x=interval(-5,5)", f"log={tmp_path}/log"]
    sweep(tmp_path / "a", *more, "letter=a", "+study=study/a", f"{N}=2")  # a study of its own
    sweep(tmp_path, *more, *ARMS, f"{N}=3")
    assert order_of(tmp_path)[2:] == [("b", 0), ("b", 1), ("a", 2), ("b", 2)]


def test_arms_of_overrides_have_spaces_of_their_own(tmp_path):
    arms = "{far: ['x=interval(90,95)', 'letter=f'], near: ['k=range(1,4)', 'x=2.0']}"
    sweep(tmp_path, f"hydra.sweeper.arms={arms}", "seed=0", f"{N}=2")
    arms = results(tmp_path)["arms"]
    assert arms["far"]["best_params"].keys() == {"x"} and arms["far"]["best_value"] > 80**2
    assert arms["near"]["best_params"].keys() == {"k"} and arms["near"]["best_value"] <= 2
    assert results(tmp_path)["study_name"] == "study/near"


def test_an_arm_that_fails_leaves_the_others_alone(tmp_path):
    arms = "{bad: ['what=word'], good: ['what=value']}"
    more = ["x=interval(-5,5)", "hydra.sweeper.max_failures=0", "hydra.sweeper.retries=0"]
    with pytest.raises(InputError, match="foo"):
        sweep(tmp_path, f"hydra.sweeper.arms={arms}", *more, f"{N}=2")
    assert states(tmp_path / "good", "study/good") == ["COMPLETE", "COMPLETE"]
    assert states(tmp_path / "bad", "study/bad") == ["FAIL"]
    found = results(tmp_path)
    assert found["arms"]["bad"]["best_value"] is None
    assert found["study_name"] == "study/good"


def test_fresh_seeds_for_the_best_of_each(tmp_path):
    more = [*ARMS, "x=choice(1,2,3)", "hydra/sweeper/sampler=grid", "hydra.sweeper.confirm=1"]
    sweep(tmp_path, *more, "hydra.sweeper.n_trials=null", "hydra.sweeper.confirm_seeds=2")
    for arm in results(tmp_path)["arms"].values():
        assert arm["best_params"] == {"x": 2}
        assert arm["confirmed"][1]["seeds"].keys() == {"1", "2"}
    assert (tmp_path / "b" / "1-seed2").is_dir()


BAD = {
    "hydra.sweeper.arms=letter": "hydra.sweeper.arms=letter: must be swept",
    "hydra.sweeper.arms={}": "hydra.sweeper.arms={}: {label: ",
    "hydra.sweeper.arms={a/b: ['x=1']}": "hydra.sweeper.arms=a/b: a label is a name",
    "hydra.sweeper.arms={..: ['x=1']}": "hydra.sweeper.arms=..: a label is a name",
    "hydra.sweeper.arms={a: 'x=1'}": "hydra.sweeper.arms.a=x=1: a list of overrides",
    "hydra.sweeper.arms={a: ['y=1']}": "'y'",
    "hydra.sweeper.fixed={x: 1}": "x=interval(0,1): fixed by hydra.sweeper.fixed={'x': 1}",
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_told_before_any_trial(mistake, tmp_path):
    with pytest.raises(Exception) as error:
        sweep(tmp_path, mistake, "x=interval(0,1)")
    assert BAD[mistake] in str(error.value)
    assert not list(tmp_path.rglob("*.journal"))


def test_arms_need_studies_of_their_own(tmp_path):
    with pytest.raises(InputError, match="study_name=one: every arm needs its own"):
        sweep(tmp_path, *ARMS, "x=interval(0,1)", "hydra.sweeper.study_name=one")

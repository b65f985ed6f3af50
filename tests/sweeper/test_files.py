"""Every file in sweeps/ through the command, on tiny_gpt2: few trials, real training."""

import json

import pytest
import yaml
from toy import results

from peftlab.__main__ import main
from peftlab.config import HOME

SMALL = (
    "model=tiny_gpt2 dataset=local dataset.test_size=8 dataset.train_size=8 tracking=none "
    "precision=fp32 threads=1 epochs=1 batch=8 study=study"
).split()
ONE = "hydra.sweeper.n_trials=1 hydra.sweeper.confirm=0".split()
RUNS = {  # file: (words that make it small, its arms and their number of trials)
    "lr": (["method=ia3", "optimizer.lr=choice(1e-3,1e-4)"], {"": 2}),
    "tune": (["method=ia3", "hydra.sweeper.n_trials=2"], {"": 2}),
    "budget": (["method=tied_lora_extra", "aux.budget=50000", *ONE], {"": 1}),
    "gamma": (["method.gamma=1,10", "optimizer.lr=choice(1e-3)"], {"": 4}),
    "gamma_vs_loraplus": (ONE, {"gamma": 1, "loraplus": 1, "neither": 1}),
    "rank": (["method=lora", "method.rank=1,3", *ONE], {"1": 1, "3": 1}),
    "bottleneck": (["method.bottleneck=2,5", *ONE], {"2": 1, "5": 1}),
    "targets": (
        ["method=lora", "method.sites=choice([qkv,o],mlp)", *ONE],
        {"qkv-o": 1, "mlp": 1},
    ),
    "tying": (
        ["aux.budget=100000", *ONE],
        {"partially_tied_lora": 1, "tensor_embedding": 1, "tied_lora_extra": 1},
    ),
    "leaderboard": (
        ["method=ia3,layernorm", "hydra.sweeper.n_trials=2", "hydra.sweeper.confirm=1"],
        {"ia3": 2, "layernorm": 2},
    ),
}


@pytest.fixture
def sweeps(rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda name, *more: main(
        ["train", "-m", f"+sweeps={name}", *SMALL, f"dataset.path={rows_file}", *more]
    )


def runs_of(folder):
    """The configs and results of a study's trials, by number."""
    trials = sorted((d for d in folder.iterdir() if d.name.isdigit()), key=lambda d: int(d.name))
    read = [(d / "config.yaml", d / "result.json") for d in trials]
    return [(yaml.safe_load(c.read_text()), json.loads(r.read_text())) for c, r in read]


def test_every_file_is_here():
    assert {path.stem for path in (HOME / "sweeps").glob("*.yaml")} == set(RUNS)


@pytest.fixture
def done(sweeps, tmp_path):
    """Run a file; return its results and its runs by arm."""

    def run(name, *more):
        words, arms = RUNS[name]
        assert sweeps(name, *words, *more) == 0
        study = tmp_path / "outputs" / "study"
        found = results(study)
        each = found["arms"] if "arms" in found else {"": found}
        assert {arm: r["n_trials"]["complete"] for arm, r in each.items()} == arms
        return found, {arm: runs_of(study / arm) for arm in arms}

    return run


@pytest.mark.parametrize("name", ["lr", "tune"])
def test_one_study(name, done):
    found, runs = done(name)
    values = [result["final"]["train_bits_per_token"] for _, result in runs[""]]
    assert found["best_value"] == min(values)


def test_budget(done, sweeps, capfd):
    _, runs = done("budget")
    ((config, result),) = runs[""]
    assert result["method"]["trainable_params"] == pytest.approx(50_000, rel=0.02)
    assert config["method"]["r_1"] != 16 and set(found_keys(config)) >= {"r_1", "r_2"}
    capfd.readouterr()
    mistakes = {
        ("method=tied_lora", "aux.budget=10"): "nearest is",
        ("method=layernorm", "aux.budget=10"): "3,456, always",
        ("method=lora", "aux.budget=98304", "method.rank=4"): "fixed by hydra.sweeper.fixed",
        ("method=hf_peft", "aux.budget=50000"): "no count in closed form",
        ("method=lora", "aux.budget=-3"): "a whole number, from 1",
        ("method=lora",): "aux.budget=None: a whole number, from 1",
    }
    for mistake, told in mistakes.items():
        assert sweeps("budget", *mistake, "study=other") == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("peftlab: ") and told in line, line


def found_keys(config):
    return [key.partition(".")[2] for key in config["method"]["search"]]


def test_gamma(done):
    _, runs = done("gamma")
    settings = [(c["method"]["random_factor"], c["method"]["gamma"]) for c, _ in runs[""]]
    assert settings == [("A", 1), ("A", 10), ("B", 1), ("B", 10)]
    assert all(config["precision"] == "fp32" for config, _ in runs[""])


def test_gamma_vs_loraplus(done):
    _, runs = done("gamma_vs_loraplus")
    configs = {arm: config for arm, ((config, _),) in runs.items()}
    optimizers = {arm: c["optimizer"]["_target_"] for arm, c in configs.items()}
    assert optimizers["loraplus"] == "peftlab.optim.lora_plus" != optimizers["gamma"]
    assert configs["gamma"]["method"]["gamma"] > 1 == configs["loraplus"]["method"]["gamma"]
    assert {r["method"]["trainable_params"] for ((_, r),) in runs.values()} == {98_304}


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("rank", "rank", [1, 3]),
        ("bottleneck", "bottleneck", [2, 5]),
        ("targets", "sites", [["qkv", "o"], "mlp"]),
    ],
)
def test_one_study_for_each_value(name, key, values, done):
    _, runs = done(name)
    assert [config["method"][key] for ((config, _),) in runs.values()] == values


def test_tying_is_at_equal_parameters(done):
    _, runs = done("tying")
    counts = {arm: r["method"]["trainable_params"] for arm, ((_, r),) in runs.items()}
    assert all(count == pytest.approx(100_000, rel=0.05) for count in counts.values()), counts


def test_leaderboard(done, sweeps, tmp_path):
    found, runs = done("leaderboard")
    arms = found["arms"]
    best = min(arms.values(), key=lambda result: result["best_value"])
    assert found["best_value"] == best["best_value"] and found["study_name"] == best["study_name"]
    for arm, ((_, first), (_, second)) in runs.items():
        assert first["study"] == f"study/{arm}" and second["trial"] == 1
        (again,) = arms[arm]["confirmed"].values()
        assert list(again["seeds"]) == ["1", "2", "3"]
        assert arms[arm]["best_value"] == pytest.approx(sum(again["seeds"].values()) / 3)
    # the methods took turns: no trial of one started before the other's last one
    folders = [tmp_path / "outputs/study" / arm / n for n in "01" for arm in runs]
    moments = [(folder / "rows.jsonl").stat().st_mtime_ns for folder in folders]
    assert moments == sorted(moments)
    # again: nothing is left to do; one trial more: only that
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    words = [*RUNS["leaderboard"][0], "hydra.sweeper.n_trials=3", "hydra.sweeper.confirm=0"]
    assert sweeps("leaderboard", *words) == 0
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    assert {p.parent.name for p in after.keys() - before.keys()} == {"2"}
    assert len(after) == len(before) + 2 and before.items() <= after.items()


def test_hydras_own_words_without_a_file(sweeps, rows_file, tmp_path):
    words = ["train", "-m", "hydra/sweeper=peftlab", "hydra/sweeper/sampler=grid"]
    words += [word for word in SMALL if not word.startswith("study=")]
    assert main([*words, f"dataset.path={rows_file}", "method=ia3", "optimizer.lr=1e-3,1e-4"]) == 0
    (folder,) = (tmp_path / "outputs").iterdir()
    assert results(folder)["n_trials"]["complete"] == 2 and folder.name.startswith("multirun-")


def test_what_shows_one_config_shows_no_sweep(sweeps, capfd):
    assert sweeps("tune", "--cfg", "job") == 2
    assert capfd.readouterr().err == "peftlab: --cfg: shows one config; leave -m out\n"

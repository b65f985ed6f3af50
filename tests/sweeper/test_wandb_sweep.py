"""A whole study against the stub server: one group, and every run has its own record."""

import json

from test_wandb_run import train
from toy import trials
from wandb_stub import Stub

RATES = (1e-3, 1e-2, 1e30, 1e-7)  # the third diverges, the fourth learns nothing and is pruned
STATUS = ["completed", "completed", "diverged", "pruned"]


def test_a_study_is_a_group_of_runs_that_never_mix(tmp_path, rows_file):
    """All four in one process, with the launcher that runs jobs in the sweeper."""
    more = ["-m", "+sweeps=tune", "study=mine", "method=lora", "epochs=2"]
    more += [f"optimizer.lr=choice({','.join(map(str, RATES))})", "method.rank=choice(2)"]
    more += ["optimizer.schedule=constant", "hydra/sweeper/sampler=grid"]
    more += ["hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup=2"]
    with Stub() as stub:
        done = train(tmp_path, rows_file, stub.url, *more)
        runs = sorted(stub.runs.values(), key=lambda run: run.fields["displayName"])
    assert done.returncode == 0, done.stderr
    assert [run.fields["displayName"] for run in runs] == [f"mine-{n}" for n in range(4)]
    assert {run.fields["groupName"] for run in runs} == {"mine"}
    assert {run.fields["jobType"] for run in runs} == {"sweep"}
    assert [run.exit_code for run in runs] == [0] * 4
    assert [run.summary["status"] for run in runs] == STATUS
    study = tmp_path / "outputs" / "mine"
    for trial, run in zip(trials(study, study="mine"), runs, strict=True):
        folder = study / str(trial.number)
        result = json.loads((folder / "result.json").read_text())
        assert result["status"] == run.summary["status"]
        for key, value in trial.params.items():  # what parallel coordinates draw
            group, name = key.split(".")
            assert run.config[group][name] == value
        assert run.config["optimizer"]["lr"] == RATES[trial.number]
        flat = run.summary.values()
        assert all(value is None or isinstance(value, bool | int | float | str) for value in flat)
        if trial.state.name == "COMPLETE":
            assert run.summary["final/train_bits_per_token"] == trial.value
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        assert len(run.history) == len(rows)
        for key, place in (
            ("train/bits_per_token", ("step", "train")),
            ("epoch/train_bits_per_token", ("eval", "train")),
            ("epoch/test_bits_per_token", ("eval", "test")),
        ):
            wanted = [r["bits_per_token"] for r in rows if (r["phase"], r["split"]) == place]
            assert [row[key] for row in run.history if key in row] == wanted
    lengths = [len(run.history) for run in runs]
    assert lengths[0] == lengths[1] > lengths[3] > lengths[2]

"""`peftlab analyze`: the list, runs and folders of runs, where answers go, what is refused."""

import csv
import io
import json
import subprocess
import sys

import pytest

from peftlab.__main__ import main
from peftlab.analysis import but_seed, labels, plain, shown
from peftlab.analyze import questions, run_folders
from peftlab.recorded import Record, read_record

FIVE = {"subspace", "amplification", "spectrum", "factors", "intrinsic"}


def test_every_file_is_a_question_with_a_docstring(capsys):
    found = questions()
    assert set(found) >= FIVE and all(found.values())
    assert main(["analyze"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in found)


def test_no_torch_for_the_list():
    script = "import sys; from peftlab.__main__ import main; main(['analyze']);"
    script += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL).returncode == 0


def test_help_has_the_docstring_and_the_options(capsys):
    with pytest.raises(SystemExit) as end:
        main(["analyze", "subspace", "--help"])
    assert end.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "φ(i, j) = ‖U_iᵀ V_j‖²" in out and "--top TOP" in out and "at most; 8" in out


@pytest.fixture
def study(tmp_path):
    """Runs 1, 2 and 10 of a sweep, of which 2 diverged; links and hidden folders beside them."""
    for n, status in ((1, "completed"), (10, "completed"), (2, "diverged")):
        (tmp_path / "study" / str(n)).mkdir(parents=True)
        (tmp_path / "study" / str(n) / "result.json").write_text(json.dumps({"status": status}))
    for name in (".hidden", "wandb"):
        (tmp_path / "study" / name).mkdir()
        (tmp_path / "study" / name / "result.json").write_text('{"status": "completed"}')
    return tmp_path / "study"


def test_a_folder_stands_for_its_completed_runs(study, capsys):
    assert run_folders([study]) == [study / "1", study / "10"]
    assert "1 runs did not complete and are left out" in capsys.readouterr().err
    assert run_folders([study / "10", study]) == [study / "10", study / "1"]
    assert run_folders([study / "2"]) == [
        study / "2"
    ]  # asked for by name: read_record says why not


def test_refused(study, refused, tmp_path):
    names = ", ".join(questions())
    assert refused("subspaces", study).endswith(f"QUESTION=subspaces: one of {names}")
    assert "the following arguments are required: RUN" in refused("spectrum")
    (tmp_path / "empty").mkdir()
    assert "a folder that holds completed runs" in refused("spectrum", tmp_path / "empty")
    assert "RUN=none: the folder of a run" in refused("spectrum", "none")
    assert "a completed run; this one is diverged" in refused("spectrum", broken(study / "2"))
    assert "invalid float value: 'x'" in refused("spectrum", study, "--share", "x")
    assert "unrecognized arguments: --top 3" in refused("spectrum", study, "--top", 3)


def broken(folder):
    (folder / "config.yaml").write_text("a: 1")
    (folder / "rows.jsonl").write_text("")
    (folder / "result.json").write_text('{"status": "diverged", "run_id": "x"}')
    return folder


def test_where_an_answer_goes(finished, ask, capsys):
    run = finished("method=lora", "method.rank=2", "seed=0")
    other = finished("method=lora", "method.rank=4", "seed=1")
    answer = ask("factors", run)  # sets the cache for the calls below
    assert main(["analyze", "factors", str(run), str(other)]) == 0
    told = capsys.readouterr()
    assert "lora rank=2 seed=0" in told.out and "moved: 0.1 says" in told.out
    (file,) = (run.parent / "analyses").glob("factors-*.json")
    assert f"written: {file}" in told.err
    written = json.loads(file.read_text())
    assert written["runs"] == [read_record(folder).run_id for folder in (run, other)]
    assert (written["analysis"], written["question"], written["options"]) == (1, "factors", {})
    assert len(written["rows"]) == 4 and written["columns"] == answer["columns"]
    assert main(["analyze", "factors", str(run), "--csv"]) == 0
    assert len(list((run.parent / "analyses").glob("factors-*.json"))) == 2
    head, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert head[:5] == ["run", "factor", "tensors", "numbers", "start [rms]"]
    assert [float(rows[0][5]), rows[1][6]] == [answer["rows"][0]["change rms"], ""]
    assert main(["analyze", "factors", str(run), "-o", str(run / "result.json" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def record(folder, method, **settings):
    config = {"method": {"_target_": f"peftlab.methods.{method}.X"}, "optimizer": {}, "output": "o"}
    for key, value in settings.items():
        group, _, name = key.rpartition("__")
        (config[group] if group else config)[name] = value
    return Record(folder, config, {}, [])


def test_labels_tell_what_differs(tmp_path):
    def named(*runs):
        return labels([record(tmp_path / str(n), m, **s) for n, (m, s) in enumerate(runs)])

    lora = {"method__rank": 8, "method__lr": 1e-3, "optimizer__lr": 1e-3, "seed": 0}
    ia3 = {"method__lr": 1e-2, "optimizer__lr": 1e-2, "seed": 0}
    assert named(("lora", lora)) == ["lora"]
    assert named(("lora", lora), ("ia3", ia3)) == ["lora", "ia3"]
    assert named(("lora", lora), ("lora", lora | {"method__rank": 4}), ("ia3", ia3)) == [
        "lora rank=8",
        "lora rank=4",
        "ia3",
    ]
    more = lora | {"method__lr": 1e-4, "optimizer__lr": 1e-4, "seed": 1}
    assert named(("lora", lora), ("lora", more)) == [
        "lora lr=0.001 seed=0",
        "lora lr=0.0001 seed=1",
    ]
    gammas = [("gamma", {"method__gamma": 750.0, "seed": n}) for n in (0, 1)]
    found = named(*gammas, ("gamma", {"method__gamma": 1, "seed": 0}))
    assert found == ["gamma gamma=750 seed=0", "gamma gamma=750 seed=1", "gamma gamma=1 seed=0"]
    assert [but_seed(label) for label in found[1:]] == ["gamma gamma=750", "gamma gamma=1"]
    assert named(("lora", lora), ("lora", lora)) == [f"lora ({tmp_path}/{n})" for n in (0, 1)]


def test_cells_and_files_hold_no_nan():
    assert plain({"a": (1.5, float("nan"), [float("inf"), "x", None])}) == {
        "a": [1.5, None, [None, "x", None]]
    }
    assert [shown(cell) for cell in (None, 12345, 0.123456, "x", 1e-7)] == [
        "-",
        "12,345",
        "0.1235",
        "x",
        "1e-07",
    ]

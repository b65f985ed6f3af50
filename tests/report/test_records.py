"""Reading run folders: everything that is there, once; what is broken is told; nothing is run."""

import csv
import subprocess
import sys

import pytest
from made import make

from peftlab.__main__ import main
from peftlab.report.records import flatten, read_runs


def test_finds_runs_however_deep_and_each_once(tmp_path):
    make(tmp_path / "one")
    make(tmp_path / "sweep" / "0", trial=0)
    make(tmp_path / "sweep" / "0-seed1", trial=0, seed=1)
    make(tmp_path / "board" / "arm" / "3", trial=3)
    make(tmp_path / "one" / "wandb" / "x")  # W&B's files are read with --wandb only
    found = read_runs([tmp_path, tmp_path / "sweep", tmp_path / "one"])
    assert not found.warnings
    where = sorted(str(r.folder.relative_to(tmp_path)) for r in found.records)
    assert where == ["board/arm/3", "one", "sweep/0", "sweep/0-seed1"]
    assert {r.sweep for r in found.records if r.trial == 0} == {str(tmp_path / "sweep")}


def test_broken_files_are_one_line_each_and_the_rest_goes_on(tmp_path, capfd):
    make(tmp_path / "good")
    make(tmp_path / "torn")
    text = (tmp_path / "torn" / "result.json").read_text()
    (tmp_path / "torn" / "result.json").write_text(text[:100])
    make(tmp_path / "no_seed", result={"seed": None})
    make(tmp_path / "word", result={"final.train_bits_per_token": "low"})
    make(tmp_path / "infinite", result={"cost.train_seconds": float("nan")})
    make(tmp_path / "status", result={"status": "perhaps"})
    make(tmp_path / "list")
    (tmp_path / "list" / "result.json").write_text("[1]")
    make(tmp_path / "bytes")
    (tmp_path / "bytes" / "result.json").write_bytes(b"\xff\xfe{")
    assert main(["report", str(tmp_path), "--csv"]) == 0
    captured = capfd.readouterr()
    lines = {line.split(": ")[1]: line for line in captured.err.splitlines()}
    for name, words in {
        "torn": "not JSON",
        "no_seed": "seed: missing",
        "word": "train_bits_per_token='low'",
        "infinite": "cost.train_seconds=nan: not finite",
        "status": "status='perhaps'",
        "list": "not a JSON object",
        "bytes": "utf-8",
    }.items():
        assert words in lines[str(tmp_path / name / "result.json")]
    assert len(lines) == 7
    assert len(captured.out.splitlines()) == 2 and str(tmp_path / "good") in captured.out


def test_a_run_without_its_config_still_counts(tmp_path):
    make(tmp_path / "gone", config={"method.rank": 4})
    (tmp_path / "gone" / "config.yaml").unlink()
    make(tmp_path / "odd")
    (tmp_path / "odd" / "config.yaml").write_text("a: [1\n")
    found = read_runs([tmp_path])
    assert len(found.records) == 2 and len(found.warnings) == 2
    assert all("config.yaml" in line for line in found.warnings)
    (gone,) = (r for r in found.records if r.folder.name == "gone")
    assert gone.config["method.rank"] == 4 and gone.config["optimizer.lr"] == 1e-3


def test_nothing_in_a_run_folder_is_executed(tmp_path):
    folder = make(tmp_path / "run")
    target = tmp_path / "touched"
    (folder / "config.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{target}']\n")
    (tmp_path / "optimization_results.yaml").write_text(
        f"confirmed: !!python/object/apply:os.mkdir ['{target}']\n"
    )
    found = read_runs([tmp_path])
    assert not target.exists()
    assert [line.split(": ")[1].split(" ")[0:2] for line in found.warnings] == [["not", "YAML"]] * 2


def test_flat_keys():
    node = {"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}], "f": float("inf"), "g": None, 1: True}
    flat = {"a.b": 1, "a.c": "{}", "d": '[1, {"e": 2}]', "f": "Infinity", "g": None, "1": True}
    assert flatten(node) == flat


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nowhere"], ("DIR=nowhere", "folder")),
        (["empty"], ("DIR=empty", "no run there", "result.json")),
        ([], ("DIR=outputs", "folder")),
        (["--wandb", "nowhere"], ("--wandb=nowhere", "folder")),
        (["--wandb", "empty"], ("DIR=empty", "no run there")),
        (["full", "--csv", "-o", "gone/x.csv"], ("-o gone/x.csv", "No such file")),
        (["full", "-o", "gone/x.html"], ("-o gone/x.html", "No such file")),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, parts, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make(tmp_path / "full" / "run")
    assert main(["report", *words]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("peftlab: ") and all(part in line for part in parts), line


CODE = """
import sys, time
start = time.perf_counter()
from peftlab.__main__ import main
code = main(["report", "runs", "-o", "page.html"])
spent = time.process_time()
names = ("torch", "transformers", "wandb", "hydra.utils", "plotly")
heavy = [name for name in names if name in sys.modules]
print(code, heavy, spent)
"""


def test_a_hundred_runs_take_less_than_two_seconds_and_no_torch(tmp_path):
    for n in range(100):
        make(tmp_path / "runs" / str(n), f"method{n % 10}", 3 + n / 100, seed=n % 3)
    run = [sys.executable, "-c", CODE]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    code, heavy, spent = done.stdout.splitlines()[-1].rsplit(maxsplit=2)
    assert (code, heavy) == ("0", "[]")
    assert float(spent) < 2, done.stdout  # seconds of this process, whatever else the machine does
    assert (tmp_path / "page.html").stat().st_size < 8e6


def test_result_of_another_schema_is_kept_apart(tmp_path, capfd):
    make(tmp_path / "old", train=3.0)
    make(tmp_path / "new", train=2.0, result={"schema": 2})
    assert main(["report", str(tmp_path), "--csv"]) == 0
    captured = capfd.readouterr()
    told = "toy on words: 2 kinds of runs are kept apart, as they differ in schema (1, 2)"
    assert captured.err == f"peftlab: {told}\n"
    rows = {row["data"]: float(row["train_bits_per_token"]) for row in table(captured.out)}
    assert rows == {"words (schema 1)": 3.0, "words (schema 2)": 2.0}


def table(text):
    return list(csv.DictReader(text.splitlines()))

"""The tables in all their forms."""

import csv

import pytest
from made import GIB, make

from peftlab.__main__ import main
from peftlab.report import tables


@pytest.fixture
def folder(tmp_path):
    for seed in range(3):
        make(tmp_path / f"low{seed}", "low", 2.0 + seed / 100, seed=seed, params=500)
        make(tmp_path / f"high{seed}", "high_&_dry", 4.0 + seed / 10, seed=seed, params=20_000)
    make(tmp_path / "once", "once|only", 3.0, result={"method.mergeable": False, "merge": None})
    return tmp_path


def test_csv_has_all_numbers_in_full(folder, tmp_path, capfd):
    assert main(["report", str(folder), "--csv", "-o", str(tmp_path / "t.csv")]) == 0
    assert not capfd.readouterr().out
    with (tmp_path / "t.csv").open() as file:
        low, once, high = csv.DictReader(file)
    assert [row["method"] for row in (low, once, high)] == ["low", "once|only", "high_&_dry"]
    assert float(low["train_bits_per_token"]) == pytest.approx(2.01)
    assert float(low["train_spread"]) == pytest.approx(0.01)
    assert float(low["test_bits_per_token"]) == pytest.approx(2.51)
    assert [row["tie_group"] for row in (low, once, high)] == ["a", "-", "b"]
    assert (once["train_spread"], once["merged"], low["merged"]) == ("", "no", "yes")
    assert float(low["trainable_fraction"]) == 0.005 and float(low["peak_memory_bytes"]) == GIB
    assert (low["seeds"], low["trials"], low["train_seconds"]) == ("3", "1", "10.0")
    assert (low["base_train_bits_per_token"], low["base_test_bits_per_token"]) == ("6.0", "6.1")
    assert low["run"] == str(folder / "low0")


def test_markdown(folder, capfd):
    assert main(["report", str(folder), "--markdown"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "### toy on words, bits per token"
    assert lines[3] == "|:--|--:|--:|--:|:--|--:|:--|--:|--:|--:|"
    assert (
        lines[4] == "| low | 2.010 ± 0.010 | 2.510 ± 0.010 | 3 | a | 500 | yes | 10 s | 1 GiB | 1 |"
    )
    assert lines[5].startswith("| once\\|only | 3.000 | 3.500 | 1 | - | 1,000 | no |")
    assert lines[6].startswith("| high\\_&\\_dry | 4.100 ± 0.100 |")
    assert lines[7] == "| (base model) | 6.000 | 6.100 |  |  | 0 |  |  |  |  |"
    assert any("Welch" in line for line in lines)


def test_latex(folder, capfd):
    assert main(["report", str(folder), "--latex"]) == 0
    text = capfd.readouterr().out
    cells = "2.010 $\\pm$ 0.010 & 2.510 $\\pm$ 0.010 & 3 & a & 500 & yes & 10 s & 1 GiB & 1"
    assert f"low & {cells} \\\\" in text
    assert "high\\_\\&\\_dry & 4.100" in text and "5\\% in all" in text
    assert text.count("\\begin{") == text.count("\\end{") == 2
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert len(rows) == 5 and {row.count(" & ") for row in rows} == {9}


def test_terminal(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make(folder / "lost", "lost", status="diverged")
    make(folder / "only", status="failed", result={"dataset.name": "rhymes"})
    assert main(["report", str(folder)]) == 0
    captured = capfd.readouterr()
    lines = [line.strip() for line in captured.out.splitlines()]
    assert lines[0] == "toy on words, bits per token"
    order = [line.split()[0] for line in lines if line.startswith(("low", "once", "high", "(base"))]
    assert order == ["low", "once|only", "high_&_dry", "(base"]
    assert "lost is not ranked: 1 diverged." in lines and "page: report.html" in lines
    assert captured.err == "peftlab: toy on rhymes: lora is not ranked: 1 failed.\n"
    assert (tmp_path / "report.html").stat().st_size < 8e6


def test_without_plotly_there_are_tables_and_a_word(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", str(folder)]) == 0
    captured = capfd.readouterr()
    assert "toy on words" in captured.out and "pip install 'peftlab[report]'" in captured.err
    assert not (tmp_path / "report.html").exists()
    assert main(["report", str(folder), "-o", "x.html"]) == 2
    assert "-o x.html: the page needs plotly" in capfd.readouterr().err.splitlines()[-1]


def test_a_narrow_terminal_gets_fewer_columns_and_is_told(folder, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "PLAIN_WIDTH", 72)
    make(folder / "red", "\x1b[31mred", 5.0)
    assert main(["report", str(folder)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 72
    told = "No room for seeds, merged, time, memory: widen the terminal, or see --csv."
    assert told in " ".join(" ".join(lines).split())
    assert [line.split()[:4] for line in lines if line.startswith(" low")] == [
        ["low", "2.010", "±", "0.010"]
    ]
    assert any(line.startswith(" ?[31mred") for line in lines)  # no escape sequence gets through

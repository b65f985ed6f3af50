"""Answers of `peftlab analyze` in the report: read with distrust, shown in a real Chromium."""

import json
import os
import shutil

import pytest
from chromium import BINARY, Chromium
from made import make

from peftlab.__main__ import main
from peftlab.analysis import Analysis, Axis, Column, Figure, bars, heat, line
from peftlab.analyze import questions, write
from peftlab.recorded import Record
from peftlab.report.analyses import given, read_analysis
from peftlab.report.records import BrokenFile, read_runs

HOSTILE = "<img src=x onerror=alert(1)><a href='http://example.org'>x</a>"
ANSWER = Analysis(
    title=HOSTILE,
    columns=(Column("run"), Column("φ", "bits"), Column("n")),
    rows=((HOSTILE, 0.123456, 12345), ("b", None, 2)),
    notes=("first note", HOSTILE),
    figures=(
        Figure(HOSTILE, HOSTILE, Axis("n", "log"), Axis("y"), (line("ΔW", [1, 10], [2, 3.5]),)),
        Figure(
            "bars",
            "two",
            Axis("run", "category"),
            Axis("share", "log"),
            (bars("W", [HOSTILE, "b"], [1, 2]), bars("ΔW", [HOSTILE, "b"], [0.5, None])),
        ),
        Figure(
            "map",
            "cells",
            Axis("j", "category"),
            Axis("i", "category"),
            (
                heat(
                    "φ",
                    [1, 2, 3],
                    ["a very long name of a run indeed", 2],
                    [[1, 0, None], [0, 1, 0.5]],
                ),
            ),
        ),
    ),
)


def write_answer(file, runs, answer=ANSWER):
    records = [Record(run, {}, {"run_id": str(run)}, []) for run in runs]
    write(file, "subspace", {"top": 8}, records, answer)
    return file


@pytest.fixture
def runs(tmp_path):
    """A run on each of two data sets; an answer on the first; files that are none."""
    other = {"dataset.name": "rhymes"}
    folders = [make(tmp_path / "a", "a"), make(tmp_path / "b", "b", result=other)]
    write_answer(tmp_path / "analyses" / "x.json", folders[:1])
    return tmp_path


def test_files_that_are_no_analysis_are_told(runs):
    place = runs / "analyses"
    whole = json.loads((place / "x.json").read_text())

    def changed(name, **changes):
        (place / name).write_text(json.dumps({**whole, **changes}))

    figure = whole["figures"][0]
    trace = figure["traces"][0]

    def with_trace(**more):
        return [{**figure, "traces": [{**trace, **more}]}]

    (place / "a.json").write_text("{")
    (place / "b.json").write_text("[1]")
    changed("c.json", analysis=2)
    changed("d.json", rows=[["x", 1.0]])
    changed("e.json", figures=with_trace(type="image"))
    changed("f.json", figures=with_trace(x=[1, {}]))
    changed("g.json", figures=with_trace(mode="text"))
    changed("h.json", title=3)
    changed("i.json", runs=["of another report"])
    (place / "j.json").write_text(json.dumps(whole).replace("0.123456", "NaN"))
    (place / "k.json").write_text("[" * 10**5)
    (place / "l.json").write_text(" " * 300_000)
    changed("m.json", notes="text")
    changed("n.json", figures=with_trace(y=[1, 10**400]))
    (place / "o.txt").write_text("no JSON by its name")
    found = read_runs([runs])
    answers = given(found)
    assert [answer.runs for answer in answers] == [[str(runs / "a")]]
    told = [line.removeprefix(f"{place}/") for line in found.warnings]
    beginnings = (
        "a.json: not JSON",
        "b.json: it: not an object",
        "c.json: analysis=2: not what stands there",
        "d.json: rows: not as many cells as columns",
        "e.json: figures.traces.type='image': not one of scatter, bar, heatmap",
        "f.json: figures.traces.x={}: not what stands there",
        "g.json: figures.traces.mode='text'",
        "h.json: title=3",
        "i.json: an analysis of runs that are not here",
        "j.json: rows=nan",
        "k.json: not JSON",
        "l.json: 300,000 bytes; an analysis has 200,000 at most",
        "m.json: notes: not a list",
        "n.json: figures.traces.y=1000",
    )
    assert len(told) == len(beginnings)
    for line_, beginning in zip(told, beginnings, strict=True):
        assert line_.startswith(beginning) and line_.endswith("; left out"), line_


def test_only_what_is_known_is_kept(runs):
    file = runs / "analyses" / "x.json"
    content = json.loads(file.read_text())
    image = {"source": "http://example.org/x.png"}
    content |= {"images": [image], "script": "alert(1)"}
    content["figures"][0] |= {"layout": {"images": [image]}}
    content["figures"][0]["traces"][0] |= {"hovertemplate": "<a href='x'>", "customdata": [1]}
    file.write_text(json.dumps(content))
    kept = read_analysis(file).content
    assert set(kept) == {"question", "title", "columns", "rows", "notes", "figures"}
    assert set(kept["figures"][0]) == {"title", "caption", "x", "y", "traces"}
    assert set(kept["figures"][0]["traces"][0]) == {"type", "mode", "name", "x", "y"}
    with pytest.raises(BrokenFile, match="it: not an object"):
        file.write_text("null")
        read_analysis(file)


def test_a_page_takes_so_much(runs):
    long = Analysis("t", (Column("x"),), tuple(("x" * 1000,) for _ in range(150)), (), ())
    for n in range(5):
        write_answer(runs / "analyses" / f"long{n}.json", [runs / "a"], long)
    found = read_runs([runs])
    assert len(given(found)) == 5  # of six
    (line_,) = found.warnings
    assert "long4.json: no room: a page takes 700,000 bytes" in line_


@pytest.fixture
def browser():
    if BINARY is None:
        assert os.environ.get("CI") != "true", "CI must have Chromium: apt-get install chromium"
        pytest.skip("NO CHROMIUM: the page is not tested; apt-get install chromium")
    with Chromium() as browser:
        yield browser


def test_on_the_page(runs, browser, capsys):
    page = runs / "page.html"
    assert main(["report", str(runs), "-o", str(page)]) == 0
    browser.open(f"{page.as_uri()}#model=toy&data=words")
    drawn = "Object.keys(figures).filter((id) => id.startsWith('analysis-'))"
    assert browser.evaluate(drawn) == [f"analysis-0-{n}" for n in range(3)]
    assert browser.evaluate("byId('analyses').hidden") is False
    text = "document.querySelector('.analysis h3').textContent"
    assert browser.evaluate(text) == f"subspace: {HOSTILE}"
    cells = "[...document.querySelectorAll('.analysis table')[0].rows].map("
    cells += "(row) => [...row.cells].map((cell) => cell.textContent))"
    assert browser.evaluate(cells) == [
        ["run", "φ (bits)", "n"],
        [HOSTILE, "0.1235", "12,345"],
        ["b", "-", "2"],
    ]
    notes = "[...document.querySelectorAll('.analysis li')].map((node) => node.textContent)"
    assert browser.evaluate(notes) == ["first note", HOSTILE]
    plot = "figures['analysis-0-{}'].plot"
    assert browser.evaluate(f"{plot.format(0)}._fullLayout.xaxis.type") == "log"
    assert browser.evaluate(f"{plot.format(1)}.data.map((t) => t.y)") == [[1, 2], [0.5, None]]
    assert browser.evaluate(f"{plot.format(1)}._fullLayout.xaxis.type") == "category"
    assert browser.evaluate(f"{plot.format(2)}.data[0].z") == [[1, 0, None], [0, 1, 0.5]]
    colours = f"[{plot.format(0)}.data[0], ...{plot.format(1)}.data].map((t) => t.marker.color)"
    change, weight, same = browser.evaluate(colours)  # ΔW, W, ΔW
    assert change == same != weight
    ticks = browser.evaluate(f"{plot.format(2)}._fullLayout.yaxis.ticktext")
    assert ticks == ["a very long name of a run…", "2"]
    browser.evaluate("document.querySelector('#figure-analysis-0-2 summary').click()")
    browser.wait("document.querySelector('#figure-analysis-0-2 table').rows.length === 3")
    assert browser.evaluate("document.querySelectorAll('#analyses img, #analyses a').length") == 0
    browser.evaluate("document.querySelector('.analysis button[data-run]').click()")
    assert browser.evaluate("state.run !== null && runs.name[state.run]") == "a"
    # another board has none; the first one again has its own
    choose = "(() => {{ const s = byId('data-set'); s.value = '{}';"
    choose += " s.dispatchEvent(new Event('change')); }})()"
    browser.evaluate(choose.format("rhymes"))
    assert browser.evaluate("byId('analyses').hidden") is True and not browser.evaluate(drawn)
    browser.evaluate(choose.format("words"))
    assert len(browser.evaluate(drawn)) == 3
    browser.resize(390, 844)
    browser.open(page.as_uri())
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.console == []
    assert not [
        url for url in browser.requests if not url.startswith(("file:", "data:", "blob:", "about:"))
    ]


QUICK = {  # question -> its runs, and what makes it quick
    "ablation": ("lora", "--rows", "2"),
    "amplification": ("lora",),
    "factors": ("lora",),
    "forgetting": ("lora", "wide", "--source", "pydoc", "--rows", "2"),
    "inference": ("lora", "--rounds", "2", "--tokens", "2", "--prompt", "4"),
    "intrinsic": ("lora", "wide", "--dimension", "rank", "--reference", "full"),
    "memory": ("lora", "full"),
    "spectrum": ("lora",),
    "subspace": ("lora", "wide", "full"),
}


def test_every_analysis_is_drawn(finished, session_folder, tmp_path, browser, monkeypatch):
    """Real answers of real runs: a figure for each, nothing empty, no complaint, no request."""
    monkeypatch.setenv("PEFTLAB_CACHE", str(session_folder / "cache"))
    assert QUICK.keys() == questions().keys()
    made = {
        "lora": ("method=lora", "method.rank=2", "seed=0"),
        "wide": ("method=lora", "method.rank=4", "seed=0"),
        "full": ("method=full",),
    }
    for name, overrides in made.items():
        shutil.copytree(finished(*overrides), tmp_path / "runs" / name)
    for question, words in QUICK.items():
        given_words = [str(tmp_path / "runs" / word) if word in made else word for word in words]
        assert main(["analyze", question, *given_words]) == 0
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "runs"), "-o", str(page)]) == 0
    browser.open(page.as_uri())
    titles = "[...document.querySelectorAll('.analysis h3')].map((node) => node.textContent)"
    asked = {title.partition(":")[0] for title in browser.evaluate(titles)}
    assert asked >= QUICK.keys()
    drawn = browser.evaluate(
        "Object.values(figures).filter((f) => f.id.startsWith('analysis-')).map((f) => ["
        "f.title, f.plot.querySelectorAll('.trace, .hm').length, f.plot._fullLayout.height])"
    )
    assert len(drawn) >= len(QUICK)
    assert all(marks > 0 and height > 200 for _, marks, height in drawn), drawn
    maps = browser.evaluate(
        "Object.values(figures).filter((f) => f.title.startsWith('φ between runs'))"
        ".map(({ plot }) => [plot.data[0].zmin, plot.data[0].zmax, plot.data[0].z.flat()])"
    )
    cells = [cell for _, _, z in maps for cell in z if cell is not None]
    assert [found[:2] for found in maps] == [[min(cells), max(cells)]] * 2
    for width in (1280, 390):
        browser.resize(width, 844)
        browser.wait(f"document.documentElement.scrollWidth <= {width}")
    assert browser.console == []
    assert {url.partition(":")[0] for url in browser.requests} <= {"file", "data", "blob", "about"}

"""The page in a real Chromium: selectors, linked figures, keyboard, no error, no request."""

import json
import os
import time

import pytest
from chromium import BINARY, Chromium
from made import make

from peftlab.__main__ import main

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser():
    if BINARY is None:
        assert os.environ.get("CI") != "true", "CI must have Chromium: apt-get install chromium"
        pytest.skip("NO CHROMIUM: the page is not tested; apt-get install chromium")
    with Chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two models and data sets; a study with γ; seeds; a diverged run; names that are HTML."""
    folder = tmp_path_factory.mktemp("page")
    runs = folder / "runs"
    small = {"model.name": "tiny", "model.sha256": "b" * 64, "dataset.name": "rhymes"}
    # (train, test, parameters): on the train front are a, b and d, on the test front a and b
    for name, train, test, params in (
        ("a", 4.0, 4.2, 100),
        ("b", 3.0, 3.1, 1_000),
        ("c", 3.5, 3.9, 5_000),
        ("d", 2.5, 3.3, 50_000),
    ):
        for seed in (0, 1):
            more = {"method.gamma": 1.0} if name == "c" else {}
            shift = seed / 100
            where = runs / f"{name}{seed}"
            make(where, name, train + shift, test + shift, seed=seed, params=params, config=more)
    for trial in range(12):
        more = {"method.gamma": 10.0 ** (trial % 4), "optimizer.lr": 10.0 ** -(trial % 5)}
        train, where = 5 - trial / 10, runs / "study" / str(trial)
        make(where, "boost", train, trial=trial, params=1_000 * 2**trial, config=more)
    make(runs / "lost", "lost", status="diverged")
    make(runs / "tiny", HOSTILE, 1.0, result={**small, "method.name": HOSTILE})
    make(runs / "tiny2", "b", 2.0, result=small | {"error": HOSTILE})
    (runs / "broken").mkdir()
    (runs / "broken" / "result.json").write_text("{")
    assert main(["report", str(runs), "-o", str(folder / "page.html")]) == 0
    return (folder / "page.html").as_uri()


@pytest.fixture
def opened(browser, page):
    """Open the page at its start; afterwards nothing was complained of, nothing asked for."""
    browser.console.clear()
    browser.requests.clear()
    browser.resize(1280, 900)
    browser.open(page + "#model=toy&data=words")
    yield browser
    browser.evaluate("1")
    assert browser.console == []
    asked = {url.partition("#")[0] for url in browser.requests}
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} <= {page, "about:blank"}


def names(browser, figure="train-params"):
    return browser.evaluate(f"figures['{figure}'].plot.data.map((trace) => trace.name)")


def choose(browser, selector, value):
    browser.evaluate(
        f"(() => {{ const s = document.querySelector({selector!r}); s.value = {value!r};"
        " s.dispatchEvent(new Event('change')); })()"
    )


def click(browser, selector):
    browser.evaluate(f"document.querySelector({selector!r}).click()")


def front(browser, figure):
    script = f"figures['{figure}'].plot.data.at(-1)"
    return browser.evaluate(f"[{script}.name, {script}.x, {script}.y]")


def test_points_and_pareto_front(opened):
    assert names(opened) == ["d", "b", "c", "boost", "a", "Pareto front"]
    assert front(opened, "train-params") == [
        "Pareto front",
        [100, 1000, 50000],
        [4.005, 3.005, 2.505],
    ]
    assert front(opened, "test-params") == ["Pareto front", [100, 1000], [4.205, 3.105]]
    assert front(opened, "test-train") == ["Pareto front", [2.505, 3.005], [3.305, 3.105]]
    axis = "figures['train-params'].plot._fullLayout"
    assert opened.evaluate(f"[{axis}.xaxis.type, {axis}.yaxis.type]") == ["log", "linear"]
    bars = opened.evaluate("figures['train-params'].plot.data[0].error_y.array")
    assert bars == [pytest.approx(0.0070711)]
    ties = opened.evaluate(
        "[...document.querySelectorAll('#best-table tbody tr')].map("
        "(row) => [row.cells[0].textContent.trim(), row.cells[4].textContent])"
    )
    assert ties[:3] == [["d", "a"], ["b", "b"], ["c", "c"]]
    assert ["boost", "-"] in ties and ties[-1][0] == "(frozen model)"


def test_pareto_of_ties_and_chains(opened):
    def pareto(xs, ys):
        return opened.evaluate(f"paretoFront({xs}, {ys})")

    assert pareto([3, 1, 2], [1, 3, 2]) == [1, 2, 0]
    assert pareto([1, 1, 1], [2, 1, 1]) == [1]
    assert pareto([1, 2, 3], [1, 1, 0.5]) == [0, 2]
    assert pareto([1, 2, 3], [1, 2, 3]) == [0]
    assert pareto([], []) == []


def test_names_of_the_front_do_not_lie_on_each_other(opened):
    """A name that would begin left of the figure stands right of its point instead."""
    script = """((second) => {
      const before = data.methods.slice();
      data.methods.splice(0, 2, "a_long_name_of_a_method", "another");
      const at = (method, params, train) => ({ method, params, train });
      const front = [at(0, 100, 1.01), at(1, second, 1)];
      const made = labels(front, [...front, at(2, 1e6, 9)], "params", "train");
      data.methods.splice(0, 2, ...before.slice(0, 2));
      return made.map(({ text, xanchor }) => [text, xanchor]);
    })"""
    first = ["a_long_name_of_a_method", "left"]
    assert opened.evaluate(f"{script}(1000)") == [first]
    assert opened.evaluate(f"{script}(1e6)") == [first, ["another", "right"]]


def test_selectors_change_the_plots_and_the_hash_restores_them(opened, page):
    click(opened, "input[name=show][value=all]")
    assert opened.evaluate("figures['train-params'].plot.data[0].x.length") == 2
    assert opened.evaluate("figures['train-params'].plot.data[3].x.length") == 12
    click(opened, "#methods input[value=d]")
    click(opened, "#methods input[value=c]")
    assert names(opened) == ["b", "boost", "a", "Pareto front"]
    assert opened.evaluate("document.querySelectorAll('#best-table tbody tr').length") == 4
    assert "3 of 6 methods" not in opened.evaluate("byId('status').textContent")
    assert "4 of 6 methods" in opened.evaluate("byId('status').textContent")
    assert opened.evaluate("some(1, 'run') + some(2, 'run')") == "1 run2 runs"
    fragment = opened.evaluate("location.hash")
    assert "show=all" in fragment and "off=c" in fragment and "off=d" in fragment
    opened.open(page + fragment)
    assert names(opened) == ["b", "boost", "a", "Pareto front"]
    checked = "[...document.querySelectorAll('#methods input:checked')].map((box) => box.value)"
    assert opened.evaluate(checked) == ["b", "boost", "a", "lost"]
    assert opened.evaluate("document.querySelector('input[value=all]').checked") is True
    opened.evaluate("location.hash = '#model=toy&data=words'")  # as a link within would
    opened.wait("figures['train-params'].plot.data.length === 6")
    click(opened, "#methods-none")
    assert opened.evaluate("figures['train-params'].plot.hidden") is True
    assert "No completed run" in opened.evaluate("figures['train-params'].empty.textContent")
    click(opened, "#methods-all")
    assert len(names(opened)) == 6


def test_a_model_brings_its_data_sets_and_names_are_texts(opened):
    assert opened.evaluate("modelNames()") == ["tiny", "toy"]
    choose(opened, "#model", "tiny")
    assert opened.evaluate("state.data") == "rhymes" and "tiny" in opened.evaluate("document.title")
    escaped = HOSTILE.replace("<", "&lt;").replace(">", "&gt;")
    assert names(opened) == [escaped, "b", "Pareto front"]
    cell = "document.querySelector('#best-table tbody th').textContent.trim()"
    assert opened.evaluate(cell) == HOSTILE
    assert opened.evaluate("document.querySelectorAll('img').length") == 0
    hover = opened.evaluate("figures['train-params'].plot.data[0].text[0]")
    assert hover.startswith(f"<b>{escaped}</b>")
    assert opened.evaluate("byId('notes').textContent").count("broken/result.json") == 1


def point(browser, figure, trace):
    """Return where in the window a trace's first point is."""
    return browser.evaluate(
        f"""(() => {{
        const plot = figures['{figure}'].plot;
        plot.scrollIntoView({{ block: 'center', behavior: 'instant' }});
        const mark = plot.querySelectorAll('.scatterlayer .trace')[{trace}].querySelector('.point');
        const box = mark.getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2];
    }})()"""
    )


def test_pointing_marks_the_run_in_all_three_and_a_click_shows_it(opened):
    opened.mouse(*point(opened, "train-params", 2))
    hovered = (
        "[...document.querySelectorAll('#figures-losses .hoverlayer')].map((l) => l.textContent)"
    )
    opened.wait(f"{hovered}.every((text) => text.includes('3.505'))")
    opened.evaluate("new Promise((done) => setTimeout(done, 200))")
    for text in opened.evaluate(hovered):
        assert text.startswith("c") and "5,000 parameters" in text and "mean of 2 seeds" in text
    opened.mouse(*point(opened, "test-train", 1), click=True)
    opened.wait("state.run !== null")
    assert opened.evaluate("data.methods[runs.method[state.run]]") == "b"
    assert opened.evaluate("document.activeElement.id") == "run"
    assert "run=" in opened.evaluate("location.hash")
    text = opened.evaluate("byId('run').textContent")
    assert "peftlab train b" in text and "peftlab reproduce " in text
    assert "optimizer.lr: 0.001" in text
    curves = opened.evaluate("byId('plot-run').data.map((trace) => [trace.name, trace.y])")
    assert [name for name, _ in curves][1:] == ["train split", "test split"]
    assert curves[1][1] == [6, 3] and curves[0][1][0] == pytest.approx(5.7)
    click(opened, "#run button[data-run]")  # the other seed
    assert opened.evaluate("runs.seed[state.run]") == 1


def test_tuning_gamma_axes_and_study(opened):
    bars = opened.evaluate("figures['gamma-bars'].plot.data.map((t) => [t.name, t.x, t.y])")
    # of 1,000 * 2^n parameters: bins of half a decade; γ is 1 for every fourth trial and for c
    assert [name for name, _, _ in bars] == ["γ = 1", "γ > 1"]
    assert bars[0][1] == [
        "1 k–3.16 k",
        "3.16 k–10 k",
        "10 k–31.6 k",
        "31.6 k–100 k",
        "100 k–316 k",
        "316 k–1 M",
        "1 M–3.16 M",
    ]
    assert bars[0][2] == [5, 3.505, 4.6, None, 4.2, None, None]
    assert bars[1][2] == [4.9, 4.7, None, 4.4, 4.3, 4.1, 3.9]
    cells = opened.evaluate("figures['gamma-map'].plot.data[0].z")
    assert min(z for row in cells for z in row if z is not None) == 3.505
    line = opened.evaluate("figures.tuning.plot.data.find((t) => t.name === 'boost')")
    assert line["x"] == list(range(1, 13))
    assert line["y"] == pytest.approx([5 - n / 10 for n in range(12)])
    assert opened.evaluate("figures.rates.plot.data[2].y") == ["boost"]
    assert len(opened.evaluate("figures.axes.plot.data")) == 5
    assert opened.evaluate("figures.trials.built.rows.length") == 12
    shares = opened.evaluate("figures.importance.plot.data[0].x")
    assert sum(shares) == pytest.approx(1)
    click(opened, "#figure-axes summary")
    opened.wait("figures.axes.table.rows.length === 6")
    cells = opened.evaluate("[...figures.axes.table.rows[1].cells].map((cell) => cell.textContent)")
    assert cells[0] == "d" and cells[3] == "195 KiB" and cells[7] == "nothing"


def test_keyboard_and_screen_reader(opened):
    assert opened.evaluate("document.documentElement.lang") == "en"
    unnamed = """[...document.querySelectorAll('select, input, button, [role=img], [role=region]')]
        .filter((node) => node.closest('.modebar') === null && !(node.labels?.length
        || node.textContent.trim() || node.getAttribute('aria-label')
        || node.getAttribute('aria-labelledby'))).map((node) => node.outerHTML.slice(0, 80))"""
    assert opened.evaluate(unnamed) == []
    twins = "[...document.querySelectorAll('[id]')].map((node) => node.id)"
    ids = [
        name
        for name in opened.evaluate(twins)
        if not name.startswith(("legend", "clip", "modebar"))
    ]
    assert len(ids) == len(set(ids))
    plots = "[...document.querySelectorAll('#results .plot:not([hidden])')]"
    labels = opened.evaluate(f"{plots}.map((plot) => plot.getAttribute('aria-label'))")
    assert len(labels) == 11 and all(len(label) > 30 for label in labels)
    reached = []
    opened.evaluate("document.body.focus()")
    for _ in range(9):
        opened.key("Tab")
        reached.append(
            opened.evaluate(
                "document.activeElement.id || document.activeElement.value"
                " || document.activeElement.tagName"
            )
        )
    assert reached[:4] == ["A", "model", "best", "SUMMARY"]  # one data set: nothing to choose
    assert reached[4:] == ["methods-all", "methods-none", "d", "b", "c"]
    opened.key(" ", "Space", " ")
    opened.wait("state.off.has('c')")
    assert opened.evaluate("document.activeElement.value") == "c"  # not lost by drawing anew
    assert "c" not in names(opened)


def test_a_phone_scrolls_in_one_direction_only(opened, page):
    opened.resize(390, 844)
    opened.open(page)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    widths = opened.evaluate(
        "[...document.querySelectorAll('.plot:not([hidden]) .main-svg')].map("
        "(svg) => svg.getBoundingClientRect().right)"
    )
    assert widths and max(widths) <= 390


def test_dark_mode(opened, page):
    def contrast():
        script = """(() => {
            const light = (c) => c.match(/[0-9.]+/g).slice(0, 3).map(Number)
                .map((v) => v / 255)
                .map((v) => (v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
                .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
            const back = light(getComputedStyle(document.body).backgroundColor);
            const texts = ['p', 'figcaption p', '.notes', 'a', '.main-svg text'].map(
                (s) => document.querySelector(s)).map((node) => {
                const style = getComputedStyle(node);
                return light(node.closest('svg') ? style.fill : style.color); });
            return texts.map((t) => (Math.max(t, back) + 0.05) / (Math.min(t, back) + 0.05));
        })()"""
        return opened.evaluate(script)

    assert min(contrast()) >= 4.5
    opened.send(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    try:
        opened.wait("getComputedStyle(document.body).backgroundColor === 'rgb(18, 22, 27)'")
        opened.wait("figures['train-params'].plot.layout.font.color === themed('--fg')")
        assert min(contrast()) >= 4.5
    finally:
        opened.send("Emulation.setEmulatedMedia", features=[])


def test_five_thousand_runs(browser, tmp_path, capfd):
    record = make(tmp_path / "runs" / "0" / "0", trial=0)
    result = json.loads((record / "result.json").read_text())
    config = (record / "config.yaml").read_text()
    rows = (record / "rows.jsonl").read_text() * 4
    for n in range(1, 5000):
        folder = tmp_path / "runs" / str(n % 25) / str(n)
        folder.mkdir(parents=True)
        lr = 10 ** -(1 + n % 997 / 250)
        own = {**result, "run_id": str(n), "trial": n}
        own["method"] = {**result["method"], "name": f"m{n % 25}", "trainable_params": 100 + 7 * n}
        own["final"] = {s: 3 + (n * 7919 % 1000) / 1000 for s in result["final"]}
        (folder / "result.json").write_text(json.dumps(own))
        (folder / "config.yaml").write_text(
            config.replace("lr: 0.001\n  betas", f"lr: {lr}\n  betas").replace(
                "lr: 0.001", f"lr: {lr}"
            )
        )
        (folder / "rows.jsonl").write_text(rows)
    page = tmp_path / "page.html"
    before = time.process_time()
    assert main(["report", str(tmp_path / "runs"), "-o", str(page)]) == 0
    assert time.process_time() - before < 40
    assert page.stat().st_size < 8e6
    browser.console.clear()
    browser.open(page.as_uri() + "#show=all")
    assert browser.evaluate("runs.board.length") == 5000
    drawn = "figures['train-params'].plot.data.reduce((sum, t) => sum + t.x.length, 0)"
    assert browser.evaluate(drawn) > 5000
    assert browser.evaluate("data.left_out") > 0
    assert "left out to keep the page small" in browser.evaluate("byId('version').textContent")
    click(browser, "#all-runs summary")
    browser.wait("byId('all-table').rows.length === 101")
    click(browser, "#pager button:nth-of-type(2)")
    browser.wait("byId('pager').textContent.includes('runs 101 to 200 of 5,000')")
    assert browser.console == []

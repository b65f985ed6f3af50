"""Hypothesis looks for input that ends in a traceback, a hang, or a half-written folder.

PEFTLAB_FUZZ=2000 sets the number of cases of each; docs/reliability.md says what was run.
"""

import json
import math
import os
import shutil
import signal
import string
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from conftest import ROWS
from faults import LEFT, SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import make
from transformers import AutoTokenizer

from peftlab.__main__ import main
from peftlab.config import HOME
from peftlab.documents import Template, tokenise
from peftlab.errors import InputError
from peftlab.recorded import read_record
from peftlab.report.command import report

CASES = int(os.environ.get("PEFTLAB_FUZZ", "0"))
HANG_S = 120


def fuzz(usual):
    return settings(
        max_examples=CASES or usual,
        deadline=None,
        derandomize=not CASES,  # in CI always the same cases: a failure there is the change's
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def no_hang():
    def on_alarm(number, frame):
        raise AssertionError(f"nothing for {HANG_S} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def printed():
    """Collect what this process and its children write to stdout and stderr."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = [os.dup(n) for n in (1, 2)]
        texts = []
        for n, file in zip((1, 2), (out, err), strict=True):
            os.dup2(file.fileno(), n)
        try:  # pytest's own stdout and stderr do not end in 1 and 2
            with (
                open(os.dup(1), "w") as o,
                open(os.dup(2), "w") as e,
                redirect_stdout(o),
                redirect_stderr(e),
            ):
                yield texts
        finally:
            for n, fd in zip((1, 2), kept, strict=True):
                os.dup2(fd, n)
                os.close(fd)
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        yield f"{prefix}{key}"


def read(name):
    return yaml.safe_load((HOME / "conf" / name).read_text()) or {}


GROUPS = ("model", "method", "optimizer", "dataset", "tracking")
SHOWN = {
    **{
        key: value for key, value in read("config.yaml").items() if key not in ("defaults", "hydra")
    },
    "model": read("model/smollm2.yaml"),
    "method": read("method/lora.yaml") | read("method/gamma_lora.yaml"),
    "optimizer": read("optimizer/adamw.yaml") | read("optimizer/schedule.yaml"),
    "dataset": read("dataset/local.yaml"),
    "tracking": {"_target_": ""},
}
# Not where a legal value may take hours, leave the folder, or ask for what only the network has.
KEYS = sorted(
    set(leaves(SHOWN))
    - {"output", "epochs", "compile", "model.source", "dataset.source", "dataset.path"}
)
CHOICES = [
    f"{group}={path.stem}"
    for group in ("method", "optimizer")
    for path in (HOME / "conf" / group).glob("*.yaml")
    if path.stem not in ("hf_peft", "schedule")
]
TEXT = st.text(max_size=12) | st.text(string.printable, max_size=12)
NUMBER = st.sampled_from("0 1 -1 2 3 7 0.5 -0.5 1e-30 1e30 1e400 nan inf -inf 1_0 0x10 1e3".split())
HUGE = st.sampled_from([str(2**63), str(-(2**64)), "9" * 400])
WORD = st.sampled_from(
    "null true false all auto '' \"\" ??? ${seed} ${nothing} ${oc.env:HOME} ${method} [] {} [1,2] "
    '{a:1} [[]] {_target_:x} ~ - = , \'1\' "a\\"b" nf4 bf16 fp32 cuda:99 completion .. /'.split()
)
VALUE = NUMBER | HUGE | WORD | TEXT | TEXT.map(json.dumps)
KEY = st.sampled_from(KEYS) | st.sampled_from(GROUPS) | TEXT.map(lambda t: t.replace("hydra", ""))
OVERRIDE = st.builds(
    "{}{}={}".format, st.sampled_from(["", "", "", "+", "++"]), KEY, VALUE
) | st.sampled_from([*CHOICES, *(f"~{key}" for key in KEYS)])
GARBAGE = st.text(max_size=20).filter(lambda t: not t.startswith("-"))


@fuzz(40)
@given(words=st.lists(OVERRIDE, min_size=1, max_size=3) | st.lists(GARBAGE, min_size=1, max_size=2))
def test_overrides(words):
    """A run on two rows, or one line; never a folder without its result."""
    words = [word for word in words if "\0" not in word and "hydra" not in word]  # no argument may
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name, printed() as texts, no_hang():
        folder = Path(name)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
        os.chdir(folder)
        try:
            base = [w for w in SMALL if not w.startswith(("dataset.test", "epochs", "batch"))]
            sizes = ["dataset.test_size=1", "epochs=1", f"dataset.path={folder}/rows.jsonl"]
            code = main(["train", *base, *sizes, *words])
        finally:
            os.chdir(before)
        left = sorted(folder.rglob("*"))
        runs = [path.parent for path in left if path.name == "config.yaml"]
        files = [path for path in left if path.is_file() and path.name != "rows.jsonl"]
    _, err = texts
    assert "Traceback" not in err, err
    if code == 0:
        (run,) = runs
        assert {p.name for p in left if p.parent == run} <= {*LEFT, "run.log"}
        assert [p for p in files if p.parent != run] == []
    else:
        assert code == 2, (code, err)
        line = err.splitlines()[-1]
        assert line.startswith("peftlab: ") and err.count("peftlab: ") == 1, err
        assert files == [], files


@pytest.mark.parametrize("word", ["dataset=[[]]", "method=[1,2]", "optimizer=7"])
def test_a_group_given_something_else(word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", word]) == 2
    group, _, value = word.partition("=")
    shown = value.replace(",", ", ")
    line = capsys.readouterr().err
    assert line.startswith(f"peftlab: {group}={shown}: one of ") and line.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(HOME / "peftlab" / "assets" / "tiny_gpt2")


NAMES = ["a", "b", "text", "0", "a b", "ä"]
PIECE = st.sampled_from(["{", "}", "{{", "}}", "!r", ":>9", ".x", "[0]", "\n", *NAMES]) | TEXT
ANY = st.text(max_size=8) | st.integers() | st.floats() | st.none() | st.booleans()
DATASET = {"template": None, "replace": None, "packing": False}


@fuzz(2000)
@given(
    template=st.lists(PIECE | st.sampled_from([f"{{{n}}}" for n in NAMES]), max_size=6).map(
        "".join
    ),
    row=st.dictionaries(st.sampled_from(NAMES), ANY | st.lists(ANY, max_size=2), max_size=4),
    loss_on=st.sampled_from(["all", "completion"]),
    block=st.integers(2, 40),
)
def test_templates(tokenizer, template, row, loss_on, block):
    """Tokens whose text is what Python's own format makes, or one line."""
    dataset = DATASET | {"template": template, "loss_on": loss_on, "block_length": block}
    row = row or {"a": ""}
    try:
        made = tokenise("train", [(7, row)], dataset, tokenizer, "tiny")
    except InputError as error:
        assert str(error).startswith("dataset.") or "template" in str(error)
        return
    with no_hang():
        whole = template.format(row.get("0"), **row)
        prompt, completion = Template(template, {}).fill(row, "row")
    assert prompt + completion == whole
    (ids,), (targets,) = made.ids, made.targets
    assert 0 < len(ids) == len(targets) <= block and any(target >= 0 for target in targets)
    if made.n_truncated == 0 and loss_on == "all":
        expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert [*ids, targets[-1]] == [*expected, tokenizer.eos_token_id]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
FILES = ("result.json", "config.yaml", "rows.jsonl")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "run")


def set_at(node, path, value):
    """Replace, or with `...` remove, what is at the end of a path of numbers into `node`."""
    for n in path[:-1]:
        children = list(node.values()) if isinstance(node, dict) else node
        inner = children[n % len(children)] if children else None
        if not isinstance(inner, dict | list) or not inner:
            break
        node = inner
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    key = keys[path[-1] % len(keys)]
    if value is ...:
        del node[key]
    else:
        node[key] = value


SPECIAL = st.sampled_from(
    [10**400, -(10**400), math.nan, math.inf, -1, 0, True, "", [], {}, None, "<b>", "x" * 5000]
)


@fuzz(300)
@given(data=st.data())
def test_result_files(original, data):
    """A report that leaves the file out with one line, or takes it; a record is read or refused."""
    kind = data.draw(st.sampled_from(["value", "value", "value", "whole", "cut", "bytes"]))
    name = data.draw(st.sampled_from(FILES))
    with tempfile.TemporaryDirectory() as place, printed() as texts, no_hang():
        folder = Path(place) / "runs"
        shutil.copytree(original, folder / "a")
        shutil.copytree(original, folder / "b")
        file = folder / "b" / name
        if kind == "value":
            parts = file.read_text().splitlines() if name == "rows.jsonl" else [file.read_text()]
            lines = [yaml.safe_load(part) for part in parts]
            path = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=3))
            content = lines if name == "rows.jsonl" else lines[0]
            set_at(content, path, data.draw(SPECIAL | JSON | st.just(...)))
            file.write_text("\n".join(map(json.dumps, lines)))
        elif kind == "whole":
            file.write_text(json.dumps(data.draw(JSON)))
        elif kind == "cut":
            content = file.read_bytes()
            file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        else:
            file.write_bytes(data.draw(st.binary(max_size=40)))
        form = data.draw(st.sampled_from(["csv", "latex", "markdown", "csv", None]))
        assert report([folder], wandb=(), output=folder / "out", table=form) == 0
        assert (folder / "out").stat().st_size > 0
        assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "out"]
        try:
            read_record(folder / "b")
        except InputError as error:
            assert "\n" not in str(error)
    _, err = texts
    assert all(line.startswith("peftlab: ") for line in err.splitlines()), err

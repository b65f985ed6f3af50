"""The cards: what they claim of a method is true, and the list and the page show all of them."""

import re
import unicodedata

import pytest
from conftest import make, tiny_llama

from peftlab import cards
from peftlab.__main__ import main
from peftlab.cards import METHOD_FAMILIES, card, method_names, parse
from peftlab.config import HOME
from peftlab.errors import InputError


def test_merge_and_family_of_the_docstring_are_true(name):
    found = card(name)
    net = tiny_llama()
    method = make(name, net)
    method.attach(net)
    if not method.mergeable:
        expected = "no"
    elif any(True for _ in method.parameters()):
        expected = "exact"
    else:
        expected = "in place"
    assert found.merge.partition(":")[0] == expected
    # what is merged in place are the backbone's own tensors, and those make a method selective
    assert expected != "in place" or found.family == "selective"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Family: r", "Family: x", "Family=xeparametrisation: .*`Family: selective | additive | "),
        ("Family: reparametrisation.", "", r"lora, Family=none: .*\| hybrid\.`"),
        ("Merge: exact.", "", "lora, Merge=none: .*`Merge: exact.`, `Merge: in place.` or "),
        ("Merge: exact.", "Merge: no.", "lora, Merge=no: .*`Merge: no: WHY.`"),
        ("per site: ", "per head: ", "lora, Trainable=none: lines `per site|group|model: FORMULA`"),
        ("    W' = ", "    W + ", "lora, equation=.*: an indented line with ="),
        ("LoRA: ", "LoRA, ", "lora, first line=.*: `NAME: SOURCE.`"),
    ],
)
def test_a_card_that_lacks_a_part(old, new, message):
    docstring = card("lora").docstring
    assert docstring.count(old) == 1
    with pytest.raises(InputError, match=message) as error:
        parse("lora", docstring.replace(old, new), "")
    assert "\n" not in str(error.value)


def test_a_card_is_the_docstring_in_parts():
    found = card("tied_lora")
    assert (found.title, found.merge, found.family) == ("Tied-LoRA", "exact", "reparametrisation")
    assert found.source == "Renduchintala, Konuk and Kuchaiev 2023, arXiv:2311.09578, eq. 2"
    assert found.paper == "Renduchintala, Konuk and Kuchaiev 2023, arXiv:2311.09578"
    assert found.equation == "W' = W + s diag(v) B diag(u) A"
    assert found.trainable == [
        ("group", "rank * (d_in + d_out)", ()),
        ("site", "u * rank + v * d_out", ()),
    ]
    assert card("svdora").paper == 'Conner 2025, code of "Parameter Efficient Fine Tuning Ideas"'
    assert card("full").paper == card("full").source  # it names none
    assert card("houlsby").mergeable == "no" and card("houlsby").merge.startswith("no: ")


@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [  # a site of W [24, 16]: 24 = 4 * 6, 16 = 4 * 4 as near the root as can be
        ("krona", {"a_1": -1, "a_2": -1}, 4 * 4 + 6 * 4),
        ("krona", {"a_1": 8, "a_2": 3}, 3 * 8 + 8 * 2),
        ("lokr", {"factor": -1, "rank": 2}, 4 * 4 + 2 * (6 + 4)),  # 2 * 2 < 6: two factors
        ("lokr", {"factor": -1, "rank": 3}, 4 * 4 + 6 * 4),
        ("lokr", {"factor": 2, "rank": 3}, 2 * 2 + 3 * (12 + 8)),
    ],
)
def test_counts_with_letters_of_their_own(name, arguments, count):
    sites = make("lora", tiny_llama(layers=1), sites=["gate"]).sites
    assert card(name).count(sites, 0, arguments) == count


def squeezed(text):
    """Without white space, and without combining marks, which take no column."""
    return "".join(c for c in text if not c.isspace() and not unicodedata.combining(c))


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_the_list_shows_every_method_under_its_family(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["methods"]) == 0
    out = "".join(c for c in capsys.readouterr().out if not unicodedata.combining(c))
    assert max(map(len, out.splitlines())) <= columns and "\x1b" not in out
    parts = re.split(rf"^({'|'.join(METHOD_FAMILIES)}): ", out, flags=re.M)
    for found in map(card, method_names()):
        lines = parts[parts.index(found.family) + 1].splitlines()
        heads = ("method", "equation", "merge", "what it is")
        starts = [next(line.index(h) for line in lines[1:] if h in line) for h in heads]
        (first,) = (n for n, line in enumerate(lines) if line.startswith(f"  {found.name} "))
        last = next(n for n in range(first, len(lines)) if lines[n].strip(" ─") == "")
        cells = [
            squeezed("".join(line[start:end] for line in lines[first:last]))
            for start, end in zip(starts, [*starts[1:], None], strict=True)
        ]
        count = "".join(
            f"per {unit}: {formula}" + "".join(f"where {text}" for text in where)
            for unit, formula, where in found.trainable
        )
        expected = (found.equation + count, found.mergeable, f"{found.title}: {found.paper}")
        assert cells == [found.name, *map(squeezed, expected)]
    assert "merge in place: " in out and "split(n, f): " in out


def test_one_card_is_the_docstring_and_the_yaml_untouched(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # nothing is folded
    assert main(["methods", "lokr"]) == 0
    out = capsys.readouterr().out
    yaml = (HOME / "conf" / "method" / "lokr.yaml").read_text()
    assert out == f"{card('lokr').docstring}\n\nconf/method/lokr.yaml\n{yaml}"


def test_the_page_is_what_the_docstrings_give(capsys):
    assert main(["methods", "--markdown"]) == 0
    written = capsys.readouterr().out
    on_disk = (HOME / "docs" / "methods.md").read_text()
    assert on_disk == written, "run: peftlab methods --markdown > docs/methods.md"
    heads = re.findall(r"^### (\w+)$", written, flags=re.M)
    assert sorted(heads) == method_names()


def test_the_page_keeps_every_line_of_a_docstring():
    _, *parts = cards.page().split("\n### ")
    for part in parts:
        shown = {line.replace("**", "").strip() for line in part.splitlines()}
        lines = card(part.partition("\n")[0]).docstring.splitlines()[1:]
        assert {line.replace("**", "").strip() for line in lines} <= shown
    assert len(parts) == len(method_names())

"""The card of a method: its docstring and YAML, read without importing it.

A method's class docstring has a fixed order: name and source, equation, what it is, `Init:`,
`Trainable:` (the count in closed form), `Differs from the paper:`, `Merge:`, `Family:`.
"""

import ast
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from peftlab.config import HOME, PACKAGE
from peftlab.errors import InputError, require
from peftlab.sizes import split

if TYPE_CHECKING:
    from peftlab.sites import Site

METHOD_FAMILIES = {
    "selective": "trains some of the model's own tensors",
    "additive": "trains small new parts, put into or beside the frozen layers",
    "reparametrisation": "trains the change of frozen weights, written with few numbers",
    "hybrid": "several of the others at once",
}
MERGES = {"exact": "yes", "in place": "in place", "no": "no"}  # the card's word -> the list's
LEGEND = {
    "merge yes": "the change can be written into the model's weights, and then costs nothing",
    "merge in place": "the model's own weights were trained",
    "merge no": "it stays beside the model; the card says why",
    "site": "one adapted linear layer, W [d_out, d_in]; biased: it has a bias",
    "group": "all sites of one kind and shape",
    "k": "min(d_in, d_out), where it is not a setting",
    "d_kv": "width of all keys of a token: key heads times their width",
    "n_rows": "rows of W; of one W for q, k and v, those of the kinds in `sites`",
    "split(n, f)": "two whole numbers with product n; the first is f, or for f = -1 near √n",
    "other n_...": "numbers of the model, told by the card",
    "other words": "settings of the method; a switch counts as 1 or 0",
}
WIDEST = 120  # columns: wider, a line is hard to follow
PAGE_HEAD = """\
# Methods

Written by `peftlab methods --markdown > docs/methods.md` from the docstrings in `peftlab/methods/`;
a test holds the two equal. Shapes are [rows, columns], and ' marks what is adapted."""


class Term(NamedTuple):
    """A part of the count: so many numbers per unit."""

    unit: str  # site, group or model
    formula: str  # "rank * (d_in + d_out)"
    where: tuple[str, ...]  # what the formula's own letters mean: "a, b = split(d_in, a)"


@dataclass
class Card:
    """What a method's file says about it."""

    name: str
    title: str  # "LoRA"
    source: str  # "Hu et al. 2021, arXiv:2106.09685, eq. 3"
    equation: str  # "W' = W + (alpha / rank) B A"
    trainable: list[Term]
    merge: str  # "exact", "in place" or "no: " and the reason
    family: str  # one of METHOD_FAMILIES
    docstring: str
    defaults: str  # the YAML

    def count(self, sites: Iterable["Site"], n_params: int, arguments: Mapping) -> int:
        """Trained parameters by the closed form, for sites of a model of n_params parameters.

        arguments: the constructor's keywords, and the model's numbers that the formula names.
        """
        sites = list(sites)
        groups = {site.group: site for site in sites}.values()
        sums = {
            "n_weights": sum(site.d_in * site.d_out for site in sites),
            "n_outputs": sum(site.d_out for site in sites),
        }
        units = {"site": Counter(map(_numbers, sites)), "group": Counter(map(_numbers, groups))}
        units["model"] = Counter([()])
        words = {"min": min, "max": max, "int": int, "split": split}
        total = 0
        for term in self.trainable:
            for numbers, times in units[term.unit].items():
                names = {"n_params": n_params, **sums, **words, **arguments, **dict(numbers)}
                for definition in term.where:
                    exec(definition, {"__builtins__": {}}, names)  # our own docstring
                total += times * eval(term.formula, {"__builtins__": {}}, names)
        return total

    @property
    def mergeable(self) -> str:
        """The list's word: yes, in place or no."""
        return MERGES[self.merge.split(":")[0]]

    @property
    def paper(self) -> str:
        """The source as far as it names the paper, without the place in it."""
        found = re.match(r'.*?(arXiv:[\d.]*\d|".*?")', self.source)
        return found[0] if found else self.source


def _numbers(site: "Site") -> tuple[tuple[str, str | int], ...]:
    """Return what a formula may name of a site; most sites of a model are alike."""
    return (
        ("kind", site.kind),
        ("n_rows", site.n_rows),
        ("d_in", site.d_in),
        ("d_out", site.d_out),
        ("d_kv", site.d_kv),
        ("k", min(site.d_in, site.d_out)),
        ("biased", site.module.bias is not None),
    )


def method_names() -> list[str]:
    """All methods: the files of conf/method."""
    return sorted(path.stem for path in (HOME / "conf" / "method").glob("*.yaml"))


def card(name: str) -> Card:
    """Read the card of the method `name`.

    Raises: InputError for an unknown name, or a docstring that lacks a part of the card.
    """
    if name not in method_names():
        raise InputError(f"method={name}: one of {', '.join(method_names())}")
    defaults = (HOME / "conf" / "method" / f"{name}.yaml").read_text()
    module, class_name = yaml.safe_load(defaults)["_target_"].rsplit(".", 1)
    source = PACKAGE.parent / Path(*module.split(".")).with_suffix(".py")
    tree = ast.parse(source.read_text())
    (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    return parse(name, ast.get_docstring(node) or "", defaults)


def parse(name: str, docstring: str, defaults: str) -> Card:
    """Take a docstring apart. Raises: InputError naming the part that is missing or wrong."""

    def wanted(ok: object, part: str, value: str, allowed: str) -> None:
        require(bool(ok), f"docstring of {name}, {part}", value or "none", allowed)

    first = docstring.partition("\n")[0]
    title, colon, source = first.rstrip(".").partition(": ")
    wanted(colon, "first line", first, "`NAME: SOURCE.`")
    (equation,) = re.findall(r"^    (\S.*?)(?: {4,}|$)", docstring, flags=re.M)[:1] or [""]
    wanted("=" in equation, "equation", equation, "an indented line with =")
    trainable = _trainable(docstring)
    wanted(trainable, "Trainable", "", "lines `per site|group|model: FORMULA`")
    merge, family = (_ending(docstring, word) for word in ("Merge", "Family"))
    fits = re.fullmatch(r"exact|in place|no: .+", merge)
    wanted(fits, "Merge", merge, "a line `Merge: exact.`, `Merge: in place.` or `Merge: no: WHY.`")
    families = " | ".join(METHOD_FAMILIES)
    wanted(family in METHOD_FAMILIES, "Family", family, f"a line `Family: {families}.`")
    return Card(
        name=name,
        title=title,
        source=source,
        equation=equation,
        trainable=trainable,
        merge=merge,
        family=family,
        docstring=docstring,
        defaults=defaults,
    )


def by_family() -> dict[str, list[Card]]:
    """All cards, sorted into the families that have a member."""
    cards = [card(name) for name in method_names()]
    groups = {family: [c for c in cards if c.family == family] for family in METHOD_FAMILIES}
    return {family: members for family, members in groups.items() if members}


def show_methods(name: str | None, *, markdown: bool) -> int:
    """Print the table of all methods, the page of all, or one card; return the exit code."""
    if markdown:
        print(page(), end="")
        return 0
    if name is not None:
        found = card(name)
        print(f"{found.docstring}\n\nconf/method/{name}.yaml\n{found.defaults}", end="")
        return 0
    console = Console(highlight=False)
    for family, members in by_family().items():
        console.print(f"[bold]{family}[/]: {METHOD_FAMILIES[family]}")
        console.print(_table(members, min(console.width, WIDEST)))
        console.print()
    for word, meaning in LEGEND.items():
        console.print(f"{word}: {meaning}", markup=False)
    console.print("\none method in full: peftlab methods NAME", markup=False)
    return 0


def _table(members: list[Card], width: int) -> Table:
    table = Table(box=box.HORIZONTALS, leading=1, width=width)
    table.add_column("method", no_wrap=True, min_width=max(map(len, method_names())))
    table.add_column("equation, trained parameters", overflow="fold", ratio=4)
    table.add_column("merge", no_wrap=True, min_width=max(map(len, MERGES.values())))
    table.add_column("what it is, source", overflow="fold", ratio=3)
    for found in members:
        count = Table.grid(padding=(0, 1))
        for unit, formula in _count_lines(found):
            count.add_row(unit, Text(formula, overflow="fold"))
        table.add_row(
            Text(found.name, style="bold"),
            Group(Text(found.equation), count),
            found.mergeable,
            Text(f"{found.title}: {found.paper}"),
        )
    return table


def page() -> str:
    """Return the page docs/methods.md: a table of all methods, then every card."""
    families = by_family()
    legend = "\n".join(f"- {word}: {meaning}" for word, meaning in LEGEND.items())
    summary = [_summary(family, members) for family, members in families.items()]
    cards = [
        f"## Cards: {family}\n\n" + "\n\n".join(map(_markdown_card, members))
        for family, members in families.items()
    ]
    return "\n\n".join([PAGE_HEAD, *summary, legend, *cards]) + "\n"


def _summary(family: str, members: list[Card]) -> str:
    lines = [
        f"## {family.capitalize()}: {METHOD_FAMILIES[family]}",
        "",
        "| method | what it is | equation | trained parameters | merge | source |",
        "|---|---|---|---|---|---|",
    ]
    for found in members:
        cells = (
            f"[`{found.name}`](#{found.name})",
            found.title,
            f"`{found.equation}`",
            "<br>".join(f"{unit} `{text}`".strip() for unit, text in _count_lines(found)),
            found.mergeable,
            _linked(found.paper),
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _markdown_card(found: Card) -> str:
    """Return the docstring as Markdown: indented lines are code, each section is a paragraph."""
    body = found.docstring.partition("\n")[2].strip("\n")
    body = re.sub(r"^    \S.*(?:\n    .*)*", _fenced, body, flags=re.M)
    body = re.sub(r"\n+(Init|Trainable|Differs[\w ]*|Merge|Family):", r"\n\n**\1:**", body)
    body = re.sub(r"\n{3,}", "\n\n", body)
    files = " and ".join(
        f"[{path}](../{path})"
        for path in (f"peftlab/methods/{found.name}.py", f"conf/method/{found.name}.yaml")
    )
    head = f"### {found.name}\n\n{found.title}: {_linked(found.source)}."
    return f"{head}\n\n{body.strip()}\n\nFiles: {files}"


def _fenced(block: re.Match) -> str:
    return f"\n```text\n{textwrap.dedent(block[0])}\n```\n"


def _linked(source: str) -> str:
    return re.sub(r"arXiv:([\d.]*\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def _count_lines(found: Card) -> list[tuple[str, str]]:
    """Return the count as pairs: "per site:" and its formula, "" and what its letters mean."""
    return [
        pair
        for term in found.trainable
        for pair in ((f"per {term.unit}:", term.formula), *(("", f"where {w}") for w in term.where))
    ]


def _trainable(docstring: str) -> list[Term]:
    """Return the lines `per UNIT: FORMULA`, each with the lines `where ...` that follow it."""
    lines = r"^    per (site|group|model): (.+)((?:\n +where .+)*)"
    return [
        Term(unit, formula, tuple(re.findall(r"where (.+)", where)))
        for unit, formula, where in re.findall(lines, docstring, flags=re.M)
    ]


def _ending(docstring: str, word: str) -> str:
    """Return what stands in the line `WORD: ... .`, or nothing."""
    found = re.search(rf"^{word}: (.+?)\.?$", docstring, flags=re.M)
    return found[1] if found else ""

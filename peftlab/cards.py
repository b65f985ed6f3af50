"""The card of a method: its docstring and YAML, read without importing it.

A method's class docstring has a fixed order: name and source, equation, what it is, `Init:`,
`Trainable:` (the count in closed form), `Differs from the paper:`.
"""

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console
from rich.table import Table

from peftlab.config import HOME, PACKAGE
from peftlab.errors import InputError
from peftlab.sizes import kron_sizes, thin

if TYPE_CHECKING:
    from peftlab.sites import Site

UNITS = ("site", "group", "model")


@dataclass
class Card:
    """What a method's file says about it."""

    name: str
    title: str  # "LoRA"
    source: str  # "Hu et al. 2021, arXiv:2106.09685, eq. 3"
    equation: str
    trainable: dict[str, str]  # unit (site, group, model) -> formula
    docstring: str
    defaults: str  # the YAML

    def count(self, sites: Iterable["Site"], n_params: int, arguments: Mapping) -> int:
        """Trained parameters by the closed form, for sites of a model of n_params parameters.

        arguments: the constructor's keywords, and the model's numbers that the formula names.
        """
        sites = list(sites)
        groups = list({site.group: site for site in sites}.values())
        units = {"site": sites, "group": groups, "model": [None]}
        total = 0
        for unit, formula in self.trainable.items():
            for site in units[unit]:
                names = {"n_params": n_params, "min": min, "max": max, **arguments}
                names |= {"kron_sizes": kron_sizes, "thin": thin}
                if site is not None:
                    names |= {
                        "kind": site.kind,
                        "n_rows": site.n_rows,
                        "d_in": site.d_in,
                        "d_out": site.d_out,
                        "k": min(site.d_in, site.d_out),
                        "biased": site.module.bias is not None,
                    }
                total += eval(formula, {"__builtins__": {}}, names)  # our own docstring
        return total


def method_names() -> list[str]:
    """All methods: the files of conf/method."""
    return sorted(path.stem for path in (HOME / "conf" / "method").glob("*.yaml"))


def card(name: str) -> Card:
    """Read the card of the method `name`. Raises: InputError for an unknown name."""
    if name not in method_names():
        raise InputError(f"method={name}: one of {', '.join(method_names())}")
    defaults = (HOME / "conf" / "method" / f"{name}.yaml").read_text()
    module, class_name = yaml.safe_load(defaults)["_target_"].rsplit(".", 1)
    source = PACKAGE.parent / Path(*module.split(".")).with_suffix(".py")
    tree = ast.parse(source.read_text())
    (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    docstring = ast.get_docstring(node) or ""
    title, origin = docstring.splitlines()[0].rstrip(".").split(": ", 1)
    return Card(
        name=name,
        title=title,
        source=origin,
        equation=_equation(docstring),
        trainable=_trainable(docstring),
        docstring=docstring,
        defaults=defaults,
    )


def show_methods(name: str | None) -> int:
    """Print the table of all methods, or one card; return the exit code."""
    console = Console(highlight=False)
    if name is not None:
        found = card(name)
        console.print(found.docstring, markup=False)
        console.print(f"\nconf/method/{name}.yaml\n{found.defaults}", markup=False, end="")
        return 0
    table = Table(title="methods (one card: peftlab methods NAME)", title_justify="left")
    for column in ("method", "W' or y' =", "trained parameters", "source"):
        table.add_column(column, overflow="fold")
    for found in map(card, method_names()):
        counts = "\n".join(f"{formula} per {unit}" for unit, formula in found.trainable.items())
        table.add_row(found.name, found.equation, counts, found.source)
    console.print(table)
    console.print(
        "group: all sites of one kind and shape; d_in, d_out: the sides of a site's W; "
        "n_rows: its rows, of one W for q, k and v those of the kinds in `sites`"
    )
    return 0


def _equation(docstring: str) -> str:
    """Return the right side of the first indented line."""
    (first, *_) = (line for line in docstring.splitlines() if line.startswith("    "))
    return re.split(r" {4,}", first.split("=", 1)[1].strip())[0]


def _trainable(docstring: str) -> dict[str, str]:
    """Return the lines `per UNIT: FORMULA` of the section Trainable."""
    return dict(re.findall(rf"^    per ({'|'.join(UNITS)}): (.+)$", docstring, flags=re.M))

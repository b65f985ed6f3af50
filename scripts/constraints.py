"""Print the versions of all that peftlab and its extras need, as installed here.

    python scripts/constraints.py > .ci/constraints.txt     after the tests have passed with them

CI installs these very versions, so that only a change of this repository changes its outcome.
"""

import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "peftlab"
HOME = Path(__file__).resolve().parents[1]
EXTRAS = ("", "dev", "peft", "postgresql", "report", "slurm")
HEADER = "# Made by scripts/constraints.py: what CI installs.\n"


def needed() -> dict[str, str]:
    """Return name -> version of every package that an install with all extras brings."""
    found: dict[str, str] = {}
    todo = [(ROOT, extra) for extra in EXTRAS]
    seen = set(todo)
    while todo:
        name, extra = todo.pop()
        if name != ROOT:
            found[name] = distribution(name).version
        for requirement in requirements(name, extra):
            pairs = [(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)]
            todo += [pair for pair in pairs if pair not in seen]
            seen.update(pairs)
    # Without "+cpu" and the like, which says where a build came from.
    return {name: found[name].partition("+")[0] for name in sorted(found)}


def requirements(name: str, extra: str) -> Iterator[Requirement]:
    """Yield what a package needs here, with this extra: ours by pyproject.toml, as it is now."""
    if name == ROOT:
        asked = ProjectMetadata(str(HOME), PluginManager()).core
        texts = asked.optional_dependencies[extra] if extra else asked.dependencies
    else:
        texts = distribution(name).requires or []
    for requirement in map(Requirement, texts):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


if __name__ == "__main__":
    sys.stdout.write(HEADER + "".join(f"{name}=={v}\n" for name, v in needed().items()))

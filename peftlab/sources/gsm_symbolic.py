"""gsm_symbolic: grade-school maths problems with worked answers, drawn from templates.

Fields: question, answer (its last line is "#### <number>"), template (0 to 99). The rows do not
exist in the package (reasoning-gym, after Mirzadeh et al. 2024, arXiv:2410.05229): its generator
functions make them, here with fixed seeds, in a process of their own that sees nothing but three
unpacked files and the standard library.

Rows of one template differ in names and numbers only, so an honest test holds out whole templates
(`split_by: template`).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftlab.sources import Rows, _gsm_generate, open_wheel, packaged_id

VERSION = 1  # raise it whenever the rows change
FILES = (
    "reasoning_gym/utils.py",
    "reasoning_gym/arithmetic/gsm_symbolic/generators_00_49.py",
    "reasoning_gym/arithmetic/gsm_symbolic/generators_50_99.py",
)


def content_id(dataset: Mapping[str, Any]) -> str:
    """Return the identity of the rows."""
    return packaged_id(dataset, "gsm_symbolic", VERSION)


def load(dataset: Mapping[str, Any]) -> Rows:
    """Return up to 24 different problems of each template, by template."""
    with tempfile.TemporaryDirectory() as folder:
        with open_wheel("gsm_symbolic") as archive:
            # Without their __init__ files the packages are empty, so nothing else is imported.
            archive.extractall(folder, FILES)
        made = subprocess.run(
            [sys.executable, "-I", "-S", str(Path(_gsm_generate.__file__)), folder],
            cwd=folder,
            stdout=subprocess.PIPE,
            check=True,
            encoding="utf-8",
        ).stdout
    return Rows([json.loads(line) for line in made.split("\n") if line], None)

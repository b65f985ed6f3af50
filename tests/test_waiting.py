"""Threads that wait for each other spin for a moment, unless the user has said how they wait."""

import os
import re
import subprocess
import sys

import pytest

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.skipif(sys.platform != "linux", reason="needs GNU's OpenMP")
@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "3000"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
    ],
)
def test_openmp_spins_for_a_moment_or_as_the_user_says(given, spins):
    others = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", "import peftlab.parts"],
        check=True,
        capture_output=True,
        text=True,
        env=others | given | {"OMP_DISPLAY_ENV": "VERBOSE"},
    )
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr) == [spins]

"""What is installed, downloaded and shipped: versions locked, hashes pinned, contents known."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from peftlab.config import HOME
from peftlab.files import sha256_of
from peftlab.packages import PACKAGES

CONSTRAINTS = HOME / ".ci" / "constraints.txt"
TINY = HOME / "peftlab" / "assets" / "tiny_gpt2"


def locked():
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    return dict(re.fullmatch(r"([a-z0-9.-]+)==([\w.!]+)", line).groups() for line in lines)


def test_every_package_that_ci_installs_is_locked(monkeypatch):
    monkeypatch.syspath_prepend(HOME / "scripts")
    from constraints import needed

    pinned, here = locked(), needed()
    assert len(here) > 60 and set(here) <= set(pinned)
    if os.environ.get("CI"):  # and nothing else was installed
        assert {name: pinned[name] for name in here} == here


def test_the_lock_is_within_what_the_package_asks_for():
    text = (HOME / "pyproject.toml").read_text()
    asked = re.findall(r'^ *"([A-Za-z][\w.-]*(?:\[[^]]*\])?[><=!~][^"]*)",?', text, re.MULTILINE)
    requirements = [Requirement(one) for one in asked]
    assert {"torch", "optuna", "hypothesis", "ruff"} <= {one.name for one in requirements}
    pinned = locked()
    for one in requirements:
        assert one.specifier.contains(pinned[one.name.lower()]), one
    install = (HOME / ".ci" / "run").read_text()
    assert "--constraint .ci/constraints.txt" in install


def test_every_download_is_pinned_by_its_hash():
    for name, package in PACKAGES.items():
        assert re.fullmatch("[0-9a-f]{64}", package.sha256), name
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+", package.requirement), name
    model = yaml.safe_load((HOME / "conf" / "model" / "smollm2.yaml").read_text())
    assert re.fullmatch("[0-9a-f]{64}", model["sha256"]) and model["name"] in PACKAGES


def test_the_bundled_model_is_the_one_that_was_made():
    """By hashes that are written here, so that no change of it goes unseen."""
    assert {path.suffix for path in TINY.iterdir()} == {".json", ".md", ".safetensors"}
    known = {
        "model.safetensors": "f3f29d56135fecb0e0cc10cf3038807d4479c1853d9b79dd57367161ee4704b2",
        "tokenizer.json": "905ee0d79a6f449481c49b16122326b059a4c32726d0a0952ba5ebf0a85d2da2",
    }
    assert {name: sha256_of(TINY / name) for name in known} == known


def test_nothing_executable_or_pickled_is_shipped():
    tracked = subprocess.run(
        ["git", "-C", HOME, "ls-files", "peftlab", "conf", "sweeps", "hydra_plugins"],
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    if not tracked:
        pytest.skip("not a checkout")
    kinds = {Path(name).suffix for name in tracked}
    known = {".py", ".yaml", ".json", ".md", ".safetensors", ".js", ".css", ".html", ""}
    assert kinds <= known, kinds - known


def test_wheels_in_the_cache_are_archives_without_links_or_ways_out():
    from peftlab.files import cache_dir

    found = sorted((cache_dir() / "wheels").glob("*/*.whl"))
    if not found:
        pytest.skip("no package has been downloaded yet")
    for path in found:
        for member in zipfile.ZipFile(path).infolist():
            assert not member.filename.startswith("/") and ".." not in member.filename.split("/")
            assert member.external_attr >> 28 != 0o12, f"{path}: {member.filename} is a link"


def test_versions_are_recorded_with_each_result():
    from peftlab.provenance import provenance

    packages = provenance("fp32")["packages"]
    assert packages["torch"] == version("torch") and packages["peftlab"] == version("peftlab")
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in provenance("fp32")["python"]

"""The wheel holds what it should and works outside the repository."""

import json
import subprocess
import sys
import tarfile
import zipfile

import pytest

from peftlab.config import HOME

RUN = (
    "train model=tiny_gpt2 dataset=pydoc dataset.train_size=4 dataset.test_size=2 "
    "dataset.block_length=32 epochs=1 tracking=none precision=fp32 threads=1 method=tied_lora"
).split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, HOME]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("peftlab-*.whl")
    assert len(list(out.glob("peftlab-*.tar.gz"))) == 1
    return found


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {
        f"peftlab/{path.relative_to(HOME)}"
        for folder in ("conf", "sweeps")
        for path in (HOME / folder).rglob("*.yaml")
    }
    shipped |= {
        str(path.relative_to(HOME))
        for package in ("peftlab", "hydra_plugins")
        for path in (HOME / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped <= names
    extra = {name for name in names - shipped if ".dist-info/" not in name}
    assert extra == set()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_contents_of_the_source_archive(wheel):
    """All that is needed to build, read and test it; nothing of an editor, a cache or a run."""
    (path,) = wheel.parent.glob("peftlab-*.tar.gz")
    with tarfile.open(path) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    assert all(member.isreg() for member in members)  # no links
    top = path.name.removesuffix(".tar.gz")
    names = {member.name.removeprefix(f"{top}/") for member in members}
    folders = ("peftlab", "hydra_plugins", "conf", "sweeps", "scripts", "docs", "tests")
    expected = {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"}
    expected |= {
        str(file.relative_to(HOME))
        for folder in folders
        for file in (HOME / folder).rglob("*")
        if file.is_file() and not {"__pycache__", ".pytest_cache"} & set(file.parts)
    }
    assert names == expected


def test_works_outside_the_repository(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(pip, check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import peftlab;"
        f"assert peftlab.__file__.startswith({str(site)!r});"
        "from peftlab.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )

    def run(*words):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "W' = W + s diag(v) B diag(u) A" in run("methods", "tied_lora")
    run(*RUN)
    (result,) = tmp_path.glob("outputs/*/result.json")
    assert json.loads(result.read_text())["status"] == "completed"
    assert json.loads(result.read_text())["provenance"]["git_commit"] is None
    run(RUN[0], "-m", *RUN[1:], "+sweeps=lr", "optimizer.lr=1e-4")
    assert len(list(tmp_path.glob("outputs/lr-tied_lora-*/0/result.json"))) == 1
    run(RUN[0], "-m", *RUN[1:], "+sweeps=tune", "hydra.sweeper.n_trials=1")  # our plugin is found
    assert len(list(tmp_path.glob("outputs/tune-tied_lora-*/0/result.json"))) == 1

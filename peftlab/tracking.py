"""Where a run is recorded besides its own folder: Weights & Biases, or nowhere.

W&B is a mirror: its history is rows.jsonl, line by line. Whatever happens to it - no key, no
network, a dead server, a killed W&B process - the run goes on, and what could not be sent stays
in `<run>/wandb` for `peftlab sync`.
"""

import contextlib
import hashlib
import json
import logging
import netrc
import os
import shutil
import ssl
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import urlopen

from peftlab.config import number
from peftlab.errors import InputError, require

AXES = ("step", "tokens", "epoch")  # columns that place a row, never charts of their own
LABELS = ("phase", "split", "targets")  # columns that are about a row's numbers
# Of several globs that match, W&B takes any: the names themselves decide against "*".
EPOCH_METRICS = ("epoch/*", "epoch/train_bits_per_token", "epoch/test_bits_per_token")

# W&B reports its own errors to one more server; where that is out of reach, ending takes 22 s more.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What run.py tells about a run; none of it may stop or delay the run for long."""

    def start(
        self,
        *,
        config: Mapping[str, Any],
        run_dir: Path,
        run_id: str,
        study: str | None,
        trial: int | None,
        job_type: str,
        method: str,
        model: str,
        dataset: str,
    ) -> None:
        """Begin to record the resolved `config`, and the rows that `run_dir` already holds.

        job_type: train or sweep. method, model, dataset: their names.
        """
        ...

    def log(self, row: Mapping[str, Any]) -> None:
        """Record one line of rows.jsonl."""
        ...

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """End the record with the run's status and its flat summary; only `failed` is a failure."""
        ...


class NoTracker:
    """Records nothing."""

    def start(self, **run: Any) -> None:
        """Do nothing."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """Do nothing."""


class WandbTracker:
    """Records a run with Weights & Biases; conf/tracking/wandb.yaml describes the arguments.

    Raises: InputError for an argument out of range, or `online` without an API key.
    """

    def __init__(
        self,
        *,
        mode: str,
        project: str,
        entity: str | None,
        group: str | None,
        tags: Sequence[str],
        init_timeout: float,
        finish_timeout: float,
    ) -> None:
        require(
            mode in ("auto", "online", "offline"),
            "tracking.mode",
            mode,
            "one of auto, online, offline",
        )
        for tag in tags:
            fits = isinstance(tag, str) and 1 <= len(tag) <= 64
            require(fits, "tracking.tags", tag, "a text of 1 to 64 characters")
        timeouts = {
            "tracking.init_timeout": init_timeout,
            "tracking.finish_timeout": finish_timeout,
        }
        for key in timeouts:
            number(timeouts, key, above=0)
        self.mode = _mode(mode)
        self.project = project
        self.entity = entity
        self.group = group
        self.tags = tuple(tags)
        self.init_timeout = init_timeout
        self.finish_timeout = finish_timeout
        self.run = None  # of wandb, while it records

    def start(
        self,
        *,
        config: Mapping[str, Any],
        run_dir: Path,
        run_id: str,
        study: str | None,
        trial: int | None,
        job_type: str,
        method: str,
        model: str,
        dataset: str,
    ) -> None:
        """Begin to record; a run that goes on replaces its earlier record by a whole one.

        Raises: InputError for a project, entity or id that W&B refuses.
        """
        if self.mode == "disabled":
            return
        import wandb
        from wandb.errors import Error, UsageError

        wandb.setup(wandb.Settings(silent=True))  # outside of a run it prints, too
        run_dir = run_dir.resolve()
        # A trial's run on another seed has a folder of its own: <trial>-seed<seed>.
        label = run_dir.name if run_dir.name.startswith(f"{trial}-") else trial

        def init(mode: Any) -> Any:
            return wandb.init(
                mode=mode,
                dir=run_dir,
                id=run_id if trial is None else _trial_id(run_dir),
                name=run_dir.name if study is None or trial is None else f"{study}-{label}",
                group=study if self.group is None else self.group,
                project=self.project,
                entity=self.entity,
                job_type=job_type,
                tags=[method, model, dataset, *self.tags],
                config=dict(config),
                reinit="create_new",  # by default a second init returns the run that is still open
                settings=wandb.Settings(
                    init_timeout=self.init_timeout,
                    finish_timeout=self.finish_timeout,
                    finish_timeout_raises=True,
                    silent=True,
                    console="off",
                    symlink=False,
                    save_code=False,
                    x_disable_machine_info=True,  # result.json has what matters of it
                    x_save_requirements=False,
                ),
            )

        shutil.rmtree(run_dir / "wandb", ignore_errors=True)
        try:
            self.run = init(self._reachable_mode())
        except UsageError as error:
            raise InputError(f"tracking: {error}") from error
        except (Error, OSError) as error:
            _warn_offline(_first_line(error))
            wandb.teardown()  # until then W&B holds the id to be in use
            shutil.rmtree(run_dir / "wandb", ignore_errors=True)
            self.run = init("offline")
        for axis in AXES:
            self.run.define_metric(axis, hidden=True)
        self.run.define_metric("*", step_metric="tokens")
        for metric in EPOCH_METRICS:
            self.run.define_metric(metric, step_metric="epoch")
        if not self.run.offline:
            logger.info("W&B: %s", self.run.url)
        rows = run_dir / "rows.jsonl"
        if rows.exists():
            for line in rows.read_text().splitlines():
                self.log(json.loads(line))

    def log(self, row: Mapping[str, Any]) -> None:
        """Record one row: see `columns`."""
        if self.run is not None:
            try:
                self.run.log(columns(row))
            except OSError as error:
                self._lose(error)

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """End the record; a run that is pruned, diverged or stopped has not failed."""
        if self.run is None:
            return
        folder = Path(self.run.sync_dir)
        try:
            self.run.summary.update({**summary, "status": status})
            self.run.finish(exit_code=int(status == "failed"))
            self.run = None
        except TimeoutError:
            self.run = None
            folder.rename(folder.with_name(f"offline-{folder.name}"))  # so that sync finds it
            _warn_offline(f"not everything was sent in {self.finish_timeout:g} s")
        except OSError as error:
            self._lose(error)

    def _reachable_mode(self) -> str:
        # Asked first, because W&B itself tries a refused connection again until its time is up.
        if self.mode == "online" and not answers(server(), self.init_timeout):
            _warn_offline(f"{without_user(server())} does not answer")
            return "offline"
        return self.mode

    def _lose(self, error: OSError) -> None:
        """Go on without W&B, whose process is gone."""
        import wandb

        logger.warning("W&B: its process has ended (%s); the run goes on without it", error)
        self.run = None
        with contextlib.suppress(OSError):  # it says once more that the process has ended
            wandb.teardown()


def columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of rows.jsonl under W&B's names.

    A step's numbers become `train/...`, those of an evaluation `epoch/<split>_...`.
    """
    prefix = "train/" if row["phase"] == "step" else f"epoch/{row['split']}_"
    numbers = {
        prefix + key: value
        for key, value in row.items()
        if key not in AXES + LABELS and value is not None
    }
    return {axis: row[axis] for axis in AXES} | numbers


def server() -> str:
    """Return the address of W&B: WANDB_BASE_URL, that of W&B's settings file, or its default."""
    if os.environ.get("WANDB_BASE_URL"):
        return os.environ["WANDB_BASE_URL"]
    import wandb

    return wandb.setup().settings.base_url


def key_is_set() -> bool:
    """Whether W&B can log in without asking: by WANDB_API_KEY or an entry in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not path.exists():
        return False
    host = urlsplit(server()).netloc
    # The public server's older name, under which W&B still accepts its key.
    hosts = [host, "api.wandb.ai"] if host == "api.forge.coreweave.com" else [host]
    try:
        entries = netrc.netrc(path)
    except (netrc.NetrcParseError, OSError):
        return False  # for W&B, too, an unreadable file holds no key
    return any(entries.authenticators(host) for host in hosts)


def answers(url: str, seconds: float) -> bool:
    """Whether anything speaks HTTP at `url` within `seconds`; an error page is an answer.

    Raises: InputError if that is no address at all.
    """
    plain = without_user(url)
    require(urlsplit(plain).scheme in ("http", "https"), "WANDB_BASE_URL", plain, "https://...")
    try:
        urlopen(plain, timeout=seconds).close()
    except HTTPError:
        return True
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # W&B has its own settings for certificates
    except (OSError, HTTPException):
        return False
    return True


def without_user(url: str) -> str:
    """Return an address without the name and password that it may hold."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _mode(mode: str) -> str:
    """Return the mode that counts: online, offline or disabled."""
    override = os.environ.get("WANDB_MODE")
    if override:
        allowed = ("online", "offline", "disabled")
        require(override in allowed, "WANDB_MODE", override, f"one of {', '.join(allowed)}")
    if (override or mode) == "auto":
        return "online" if key_is_set() else "offline"
    if (override or mode) == "online":
        key = "WANDB_MODE" if override else "tracking.mode"
        require(key_is_set(), key, "online", "needs WANDB_API_KEY (tracking.mode=auto does not)")
    return override or mode


def _trial_id(run_dir: Path) -> str:
    return hashlib.sha256(str(run_dir).encode()).hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _warn_offline(reason: str) -> None:
    logger.warning("W&B: %s; the run is recorded offline, `peftlab sync` uploads it", reason)

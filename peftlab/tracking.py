"""Where a run is recorded besides its own folder: Weights & Biases, or nowhere.

W&B is a mirror: its history is rows.jsonl, line by line. Whatever happens to it - no key, no
network, a dead server, a killed W&B process - the run goes on, and what could not be sent stays
in `<run>/wandb` for `peftlab sync`.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from peftlab.config import number
from peftlab.errors import InputError, require
from peftlab.wandb_server import (
    ANSWER_S,
    NO_ANSWER,
    NOTHING,
    answers,
    first_line,
    held,
    key_is_set,
    lacks,
    server,
    without_user,
)

AXES = ("step", "tokens", "epoch")  # columns that place a row, never charts of their own
LABELS = ("phase", "split", "targets")  # columns that are about a row's numbers
# Of several globs that match, W&B takes any: the names themselves decide against "*".
EPOCH_METRICS = ("epoch/*", "epoch/train_bits_per_token", "epoch/test_bits_per_token")

FLUSH_S = 1.0  # W&B's record is then on the disk; a kill loses of it what is younger

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
        self.n_rows = 0  # that it was given
        self.n_there = 0  # that the server has of an earlier process: W&B would append them again

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
        """Begin to record; to a run that goes on, the server is sent what it lacks of its rows.

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
        name = run_id if trial is None else _trial_id(run_dir, run_id)

        def init(mode: Any) -> Any:
            return wandb.init(
                mode=mode,
                dir=run_dir,
                id=name,
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
                    x_transaction_log_flush_interval=FLUSH_S,
                ),
            )

        shutil.rmtree(run_dir / "wandb", ignore_errors=True)
        try:
            self.run = init(self._reachable_mode(name))
        except UsageError as error:
            raise InputError(f"tracking: {error}") from error
        except (Error, OSError) as error:
            _warn_offline(first_line(error))
            wandb.teardown()  # until then W&B holds the id to be in use
            shutil.rmtree(run_dir / "wandb", ignore_errors=True)
            self.n_there = 0
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
            step, self.n_rows = self.n_rows, self.n_rows + 1
            if step < self.n_there:
                return
            try:
                self.run.log(columns(row), step=step, commit=True)
            except _gone() as error:
                self._lose(error)

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """End the record; a run that is pruned, diverged or stopped has not failed."""
        if self.run is None:
            return
        run, folder = self.run, Path(self.run.sync_dir)
        try:
            run.summary.update({**summary, "status": status})
            run.finish(exit_code=int(status == "failed"))
            lack = None
        except TimeoutError:
            lack = f"not everything was sent in {self.finish_timeout:g} s"
        except _gone() as error:
            self._lose(error)
            return
        self.run = None
        if lack is None and not run.offline:
            lack = _missing(folder)
        if lack is not None:
            # `peftlab sync` finds it under either name, W&B's own does not.
            with contextlib.suppress(OSError):
                folder.rename(folder.with_name(f"offline-{folder.name}"))
            _warn_offline(lack)

    def _reachable_mode(self, name: str) -> str:
        if self.mode != "online":
            return self.mode
        # Asked first, because W&B itself tries a refused connection again until its time is up.
        if not answers(server(), self.init_timeout):
            _warn_offline(f"{without_user(server())} does not answer")
            return "offline"
        try:
            there = held(self.entity, self.project, name, min(self.init_timeout, ANSWER_S))
        except NO_ANSWER as error:
            _warn_offline(f"the server does not say what it holds ({first_line(error)})")
            return "offline"
        self.n_there = (there or NOTHING).n_rows
        return "online"

    def _lose(self, error: Exception) -> None:
        """Go on without W&B, whose process is gone."""
        import wandb

        reason = first_line(error)
        logger.warning("W&B: its process has ended (%s); the run goes on without it", reason)
        self.run = None
        with contextlib.suppress(*_gone()):  # it says once more that the process has ended
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


def _gone() -> tuple[type[Exception], ...]:
    """Return what W&B raises when its process has ended, before or while it is asked."""
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    return OSError, HandleAbandonedError, MailboxClosedError


def _missing(folder: Path) -> str | None:
    """Mark the record of an online run as uploaded, or return what the server lacks of it."""
    from peftlab.wandb_record import mark, said_in_the_end

    try:
        (record,) = folder.glob("run-*.wandb")
        lack = lacks(said_in_the_end(record))
        if lack is None:
            mark(record).touch()
    except (OSError, ValueError) as error:  # a full disk, a folder that was removed
        return f"its record is not as it was left ({first_line(error)})"
    return lack


def _trial_id(run_dir: Path, run_id: str) -> str:
    return hashlib.sha256(f"{run_dir} {run_id}".encode()).hexdigest()[:16]


def _warn_offline(reason: str) -> None:
    logger.warning("W&B: %s; the run is recorded offline, `peftlab sync` uploads it", reason)

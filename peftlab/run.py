"""One run: config -> backbone -> sites -> method -> fit -> result, all in one folder.

config.yaml          the resolved config
rows.jsonl           one line per step and evaluation
checkpoint/          while running: from it the same command goes on
adapter.safetensors  what was trained, each tied tensor once
result.json          the result; its presence means that the run has ended
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from peftlab.checkpoint import load_state, save_adapter, save_state
from peftlab.compiled import plain_blocks
from peftlab.config import check, method_name, run_id
from peftlab.data import Data, pad
from peftlab.errors import InputError, require
from peftlab.files import remove_unfinished, write_atomic
from peftlab.fit import Diverged, Progress, Stopped
from peftlab.memory import peak_bytes, reset_peak
from peftlab.merging import merge_check
from peftlab.method import trainable
from peftlab.parts import NOT_ARGUMENTS, Parts, assemble, construct
from peftlab.provenance import provenance
from peftlab.show import Show, warn
from peftlab.signals import listening
from peftlab.tracking import Tracker
from peftlab.trial import Interrupted, Pruned, current_trial, due
from peftlab.warm import Shelf

SCHEMA = 1
SHELF = Shelf()  # of this process
FILES = ("config.yaml", "rows.jsonl", "adapter.safetensors", "result.json")
MERGE_ROWS = 4  # of the test split, compared before and after the merge, in float32
HANDOVER_S = 1800.0  # that a trial's job waits for an earlier job of it


class Halted(SystemExit):
    """The run was asked to stop and has written its checkpoint; the exit code is 128 + signal."""


def run(config: Mapping, folder: Path, *, trial: int | None, job_type: str) -> dict:
    """Run the resolved config in `folder`, from its checkpoint if there is one; return the result.

    Raises: InputError for bad input, before anything is written; Halted after SIGTERM or SIGINT.
    """
    check(config)
    with _alone(folder, wait_s=HANDOVER_S if job_type == "sweep" else 0):
        finished = _finished(config, folder)
        if finished is not None and config["skip_finished"]:
            warn(f"{folder}: finished before, not run again (skip_finished=true)")
            return finished
        return _run(config, folder, trial=trial, job_type=job_type)


def _run(config: Mapping, folder: Path, *, trial: int | None, job_type: str) -> dict:
    started = time.perf_counter()
    tracker = construct("tracking", config["tracking"])
    if job_type == "sweep":  # the next run of this process may want the same backbone
        parts = assemble(config, load=SHELF.load)
        try:
            return _train(config, folder, parts, tracker, trial, job_type, started)
        finally:
            SHELF.give_back(parts.backbone)
    return _train(config, folder, assemble(config), tracker, trial, job_type, started)


def _train(
    config: Mapping,
    folder: Path,
    parts: Parts,
    tracker: Tracker,
    trial: int | None,
    job_type: str,
    started: float,
) -> dict:
    state, rows = folder / "checkpoint" / "state.safetensors", folder / "rows.jsonl"
    progress, n_rows = Progress(), 0
    if state.exists():
        progress, header = load_state(state, parts.net, parts.optimizer)
        _same_run(header["run_id"], config, folder)
        n_rows = header["rows"]
        warn(f"going on from step {progress.step} of {parts.total_steps}")
    for name in FILES:
        remove_unfinished(folder / name)
    _cut_rows(rows, n_rows)
    result = _facts(config, parts, trial)
    tracker.start(
        config=dict(config),
        run_dir=folder,
        run_id=result["run_id"],
        study=config["study"],
        trial=trial,
        job_type=job_type,
        method=result["method"]["name"],
        model=result["model"]["name"],
        dataset=result["dataset"]["name"],
    )
    (folder / "result.json").unlink(missing_ok=True)
    write_atomic(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
    device = next(parts.net.parameters()).device
    report = current_trial()
    reset_peak(device)
    warn(f"loaded in {time.perf_counter() - started:.1f} s")

    def save() -> None:
        save_state(
            state, parts.net, parts.optimizer, progress, rows=n_rows, run_id=result["run_id"]
        )

    with listening() as asked, rows.open("a") as lines:
        try:
            with Show(parts.total_steps, done=progress.step) as show:
                for row in parts.fit(progress, stop=lambda: asked.ends(save)):
                    line = asdict(row)
                    lines.write(json.dumps(line) + "\n")
                    lines.flush()
                    n_rows += 1
                    tracker.log(line)
                    show.row(row)
                    if row.phase == "eval":
                        save()
                    elif (percent := due(row.step, parts.total_steps)) is not None:
                        report.report(progress.running_bits_per_token, percent)
                        if report.should_prune():
                            raise Pruned
        except Pruned:
            result |= {"status": "pruned"}
        except (Stopped, SystemExit, Interrupted) as end:
            if isinstance(end, Interrupted):
                save()
            tracker.finish("stopped", {})
            warn(f"stopped at step {progress.step}; the same command goes on from there")
            if isinstance(end, Stopped):
                raise Halted(128 + asked.received[0]) from None
            raise
        except Diverged as error:
            result |= {"status": "diverged", "error": str(error)}
        except BaseException as error:
            result |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            _write_result(folder, result)
            tracker.finish("failed", _summary(result))
            raise
    plain_blocks(parts.net)
    result["cost"] = _cost(progress, parts, peak_bytes(device))
    if result["status"] == "completed":
        result |= _scores(progress, parts.data)
        about = {"run_id": result["run_id"], "method": result["method"]["name"]}
        stored = save_adapter(parts.net, folder / "adapter.safetensors", about)
        result["method"]["stored_bytes"] = stored
        result["merge"] = merge_check(parts.net, pad(parts.data.test.examples[:MERGE_ROWS]))
    _write_result(folder, result)
    shutil.rmtree(state.parent, ignore_errors=True)
    tracker.finish(result["status"], _summary(result))
    return result


@contextmanager
def _alone(folder: Path, *, wait_s: float) -> Iterator[None]:
    """Hold the run folder: two processes never work in it at once, and a dead one holds nothing.

    wait_s: how long to wait for the other; a trial's earlier job, whose sweeper was killed, ends
    at its next report.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=wait_s)
    except Timeout as error:
        raise InputError(f"hydra.run.dir={folder}: another process is working in it") from error
    except OSError as error:
        raise InputError(f"hydra.run.dir={folder}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()
        (folder / ".lock").unlink(missing_ok=True)
        if not any(folder.iterdir()):  # bad input: nothing half-written
            folder.rmdir()


def _finished(config: Mapping, folder: Path) -> dict | None:
    """Return the completed result in `folder`, if any; InputError if it is of another config."""
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        found, status = result["run_id"], result["status"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no result of a run ({error!r:.80}); remove it") from error
    _same_run(found, config, folder)
    return result if status == "completed" else None


def _same_run(found: str, config: Mapping, folder: Path) -> None:
    require(
        found == run_id(config),
        "hydra.run.dir",
        folder,
        "holds a run of another config; give another folder, or remove it",
    )


def _cut_rows(path: Path, n_rows: int) -> None:
    """Cut rows.jsonl back to the rows that the checkpoint knows; a kill may have torn the last."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    lost = f"{path}: lacks rows that the checkpoint beside it counts; remove the folder"
    if len(lines) < n_rows:
        raise InputError(lost)
    if lines:
        write_atomic(path, "".join(lines[:n_rows]))


def _write_result(folder: Path, result: Mapping) -> None:
    write_atomic(folder / "result.json", json.dumps(result, indent=1) + "\n")


def _facts(config: Mapping, parts: Parts, trial: int | None) -> dict:
    """Return all of result.json that is known before training, and nulls for the rest."""
    backbone, data, method = parts.backbone, parts.data, parts.method
    arguments = {k: v for k, v in config["method"].items() if k not in NOT_ARGUMENTS[:1]}
    return {
        "schema": SCHEMA,
        "status": "completed",
        "error": None,
        "run_id": run_id(config),
        "study": config["study"],
        "trial": trial,
        "seed": config["seed"],
        "model": {
            "name": backbone.name,
            "source": backbone.source,
            "sha256": backbone.sha256,
            "total_params": backbone.total_params,
        },
        "method": {
            "name": method_name(config["method"]),
            "args": arguments,
            "trainable_params": sum(p.numel() for _, p in trainable(parts.net)),
            "stored_bytes": None,
            "mergeable": method.mergeable,
        },
        "optimizer": dict(config["optimizer"]),
        "dataset": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "train_targets": data.train.n_targets,
            "test_targets": data.test.n_targets,
            "truncated_rows": data.train.n_truncated + data.test.n_truncated,
        },
        "final": None,
        "base": None,
        "epochs": [],
        "cost": None,
        "merge": None,
        "provenance": provenance(config["precision"]) | {"compiled": parts.compiled},
    }


def _scores(progress: Progress, data: Data) -> dict:
    """Return `base`, `final` and `epochs` of result.json."""
    final: dict[str, float | int | None] = {}
    base: dict[str, float] = {}
    for name, split, tallies in (
        ("train", data.train, progress.train),
        ("test", data.test, progress.test),
    ):
        base[f"{name}_bits_per_token"] = tallies[0].bits_per_token
        final[f"{name}_bits_per_token"] = tallies[-1].bits_per_token
        final[f"{name}_nats"] = tallies[-1].nats
        final[f"{name}_targets"] = tallies[-1].targets
        final[f"{name}_bits_per_byte"] = tallies[-1].bits_per_byte(split.n_bytes)
    return {"final": final, "base": base, "epochs": progress.epochs}


def _cost(progress: Progress, parts: Parts, peak: int) -> dict:
    n_trained = sum(p.numel() for _, p in trainable(parts.net))
    seconds = progress.train_seconds
    return {
        "train_seconds": seconds,
        "tokens_per_second": progress.tokens / seconds if seconds else None,
        "peak_memory_bytes": peak,
        "step_flops": progress.flops,
        "reused_blocks": parts.reuse.n_blocks if parts.reuse else 0,
        "reuse_seconds": parts.reuse.seconds if parts.reuse else 0.0,  # not among train_seconds
        "trainable_fraction": n_trained / parts.backbone.total_params,
    }


def _summary(result: Mapping) -> dict:
    """Return the flat numbers that a tracker shows and sorts by."""
    final = result["final"] or {}
    return {
        **{f"final/{key}": value for key, value in final.items()},
        **(result["cost"] or {}),
        "trainable_params": result["method"]["trainable_params"],
    }

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftlab.backbone import Backbone, load_backbone
from peftlab.base import base_losses
from peftlab.bits import Tally
from peftlab.checkpoint import load_state, save_adapter, save_state
from peftlab.compiled import compile_blocks, plain_blocks, worth_it
from peftlab.config import check, method_name, run_id
from peftlab.data import Batch, Data, load_data, pad
from peftlab.errors import InputError, require
from peftlab.files import write_atomic
from peftlab.fit import Diverged, Progress, Row, Stopped, fit
from peftlab.memory import peak_bytes, reset_peak
from peftlab.merging import merge_check
from peftlab.method import Method, trainable
from peftlab.optim import NetOptimizer, in_backward, schedule
from peftlab.provenance import provenance
from peftlab.show import Show, warn
from peftlab.signals import listening
from peftlab.sites import find_sites, kinds_of
from peftlab.tracking import Tracker
from peftlab.trial import Interrupted, Pruned, current_trial, due
from peftlab.warm import Shelf

SCHEMA = 1
SHELF = Shelf()  # of this process
THREADS = torch.get_num_threads()  # of this process, before any run has set them
MERGE_ROWS = 4  # of the test split, compared before and after the merge, in float32
NOT_ARGUMENTS = ("_target_", "sites", "lr", "search")  # keys of conf/method that are for the run
SCHEDULE = ("schedule", "warmup", "clip")  # keys of conf/optimizer that are for the run
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
    tracker = _instantiate("tracking", config["tracking"])
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


@dataclass
class Parts:
    """What a config composes: everything built, nothing trained, nothing written."""

    config: Mapping
    backbone: Backbone
    data: Data
    base: tuple[Tally, Tally]  # of the bare backbone on train and test split
    method: Method
    optimizer: torch.optim.Optimizer
    total_steps: int
    compiled: bool

    @property
    def net(self) -> PreTrainedModel:
        """The backbone with the method attached."""
        return self.backbone.net

    def fit(self, progress: Progress, stop: Callable[[], bool]) -> Iterator[Row]:
        """Train from `progress`; see `peftlab.fit.fit`."""
        optimizer = self.config["optimizer"]
        factor = schedule(optimizer["schedule"], warmup=optimizer["warmup"], steps=self.total_steps)
        return fit(
            self.net,
            self.data,
            self.optimizer,
            factor,
            progress,
            base=self.base,
            loss=self.backbone.compiled_loss if self.compiled else self.backbone.loss,
            epochs=self.config["epochs"],
            clip=optimizer["clip"],
            autocast=self.config["precision"] == "bf16",
            stop=stop,
        )


def assemble(config: Mapping, load: Callable[..., Backbone] = load_backbone) -> Parts:
    """Build all parts of a run, the backbone by `load`.

    Raises: InputError for whatever in the config does not fit.
    """
    torch.set_num_threads(config["threads"] or THREADS)
    # A wrong setting is told before anything is loaded; one tensor random, one 0, as in a pair.
    pair = [nn.Parameter(f(2, 2)) for f in (torch.ones, torch.zeros)]
    _check_in_backward(config, build_optimizer(config["optimizer"], pair))
    block = config["dataset"]["block_length"]
    backbone = load(config["model"], precision=config["precision"], block_length=block)
    data = load_data(
        config["dataset"],
        tokenizer=backbone.tokenizer,
        tokenizer_id=backbone.tokenizer_id(),
        seed=config["seed"],
        batch=config["batch"],
        micro_batch=config["micro_batch"],
    )
    torch.manual_seed(config["seed"])  # of the method's initial tensors and of dropout
    method = build_method(config["method"], backbone.net, backbone.kinds)
    autocast = config["precision"] == "bf16"
    base = base_losses(backbone, data, autocast=autocast)
    method.read(backbone.encode)
    method.attach(backbone.net)
    prepare(method, backbone, data, autocast=autocast)
    params = [p for _, p in trainable(backbone.net)]
    optimizer = build_optimizer(config["optimizer"], params)
    if isinstance(optimizer, NetOptimizer):
        optimizer.attach(backbone.net)
    compiled = config["compile"]
    if compiled == "auto":
        n_tokens = sum(len(example.ids) for example in data.train.examples) * config["epochs"]
        compiled = worth_it(backbone.total_params, n_tokens)
    if compiled:
        warn("compiling the decoder blocks at the next steps")
        compile_blocks(backbone.net)
    steps = data.n_steps * config["epochs"]
    return Parts(config, backbone, data, base, method, optimizer, steps, compiled)


def prepare(method: Method, backbone: Backbone, data: Data, *, autocast: bool) -> None:
    """Let the attached method look at the training data, in the precision of the run."""
    device = next(backbone.net.parameters()).device

    def nats(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return backbone.loss(backbone.net, batch.to(device))

    method.prepare(nats, data.batches(data.train))


def build_method(method: Mapping, net: PreTrainedModel, kinds: Mapping | None) -> Method:
    """Find the sites and construct the method that the config group `method` describes.

    kinds: model.kinds.
    """
    sites = find_sites(net, kinds_of(net.config.model_type, kinds), method["sites"])
    arguments = {key: value for key, value in method.items() if key not in NOT_ARGUMENTS}
    return _instantiate("method", {"_target_": method["_target_"], **arguments}, sites=sites)


def _check_in_backward(config: Mapping, optimizer: torch.optim.Optimizer) -> None:
    """Require what an update within backward needs: gradients that are whole, one at a time."""
    if in_backward(optimizer):
        clip, micro, batch = config["optimizer"]["clip"], config["micro_batch"], config["batch"]
        why = "this optimizer updates within backward"
        require(clip is None, "optimizer.clip", clip, f"null, as {why}")
        require(micro == batch, "micro_batch", micro, f"batch ({batch}), as {why}")


def build_optimizer(optimizer: Mapping, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Construct the optimizer that the config group `optimizer` describes, over `params`."""
    arguments = {key: value for key, value in optimizer.items() if key not in SCHEDULE}
    return _instantiate("optimizer", arguments, params=list(params))


def _instantiate(group: str, node: Mapping, **objects: object):
    """Call node's `_target_`; what it refuses becomes one line that names the group."""
    try:
        # partial: Hydra would copy, or resolve, objects given to the call itself
        return instantiate(dict(node), _partial_=True, _convert_="all")(**objects)
    except InputError:
        raise
    except (InstantiationException, TypeError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"{group}={node['_target_']}: {reason}") from error


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
    result = json.loads(path.read_text())
    _same_run(result["run_id"], config, folder)
    return result if result["status"] == "completed" else None


def _same_run(found: str, config: Mapping, folder: Path) -> None:
    require(
        found == run_id(config),
        "hydra.run.dir",
        folder,
        "holds a run of another config; give another folder, or remove it",
    )


def _cut_rows(path: Path, n_rows: int) -> None:
    """Cut rows.jsonl back to the rows that the checkpoint knows; a kill may have torn the last."""
    if path.exists():
        write_atomic(path, "".join(path.read_text().splitlines(keepends=True)[:n_rows]))


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

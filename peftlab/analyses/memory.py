"""How much memory training needs, computed from shapes, and how much was measured.

    estimate = weights + trained + optimizer's state + max(kept for backward + loss, gradients)

by `peftlab.estimate`: the model, the method and one forward pass over tensors without data. Rows
and length are those of the run's largest step. --model estimates the same method, optimizer and
batches for another model, of which only the config is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from peftlab.analysis import Analysis, Axis, Cell, Column, Figure, Option, bars, labels
from peftlab.backbone import locate
from peftlab.errors import InputError, require
from peftlab.estimate import Memory, estimate
from peftlab.recorded import Record

OPTIONS = (
    Option("model", Path, None, "a folder with the config.json of another model"),
    Option("length", int, None, "tokens per row; else those of the largest step, on average"),
)
MIB = 2**20
NOTES = (
    "measured: on a CPU the largest resident set of the process after loading, on a GPU what torch "
    "had allocated. rest = measured - estimate: Python, torch and its threads, copies that live "
    "for one operation, memory that the allocator keeps; on small models it is most of all.",
    "kept: what the forward pass keeps for backward, with the loss.",
)


def largest_row(rows: Sequence[Mapping[str, Any]], batch: int) -> int:
    """Return the mean length of a row, rounded up, in the step with the most tokens."""
    seen = [0, *(row["tokens"] for row in rows if row["phase"] == "step")]
    return math.ceil(max(after - before for before, after in pairwise(seen)) / batch)


def estimated(run: Record, model: PretrainedConfig | None, length: int | None) -> Memory:
    """Estimate a run, of another model if one is given, or at another length."""
    config = run.config
    longest = length or largest_row(run.rows, config["batch"])
    own = model is None
    if model is None:
        folder, _, _ = locate(config["model"])
        model = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return estimate(
        model,
        config["method"],
        config["optimizer"],
        rows=config["micro_batch"],
        length=longest,
        precision=config["precision"],
        quantize=config["model"]["quantize"],
        kinds=config["model"]["kinds"] if own else None,
    )


def analyse(runs: Sequence[Record], *, model: Path | None, length: int | None) -> Analysis:
    """Estimate every run. Raises: InputError for a folder without a model's config."""
    require(length is None or length >= 2, "--length", length, "a whole number from 2")
    other = None if model is None else _config(model)
    names = labels(runs)
    table: list[tuple[Cell, ...]] = []
    for name, run in zip(names, runs, strict=True):
        try:
            memory = estimated(run, other, length)
        except InputError as error:
            told = f"RUN={run.folder}: cannot be built without data ({error})"
            raise InputError(told) from error
        kept = memory.activations + memory.loss
        parts = memory.frozen, memory.trained, memory.gradients, memory.optimizer, kept
        measured = run.result["cost"]["peak_memory_bytes"] if other is None else None
        rest = None if measured is None else measured - memory.peak
        cells = [None if n is None else n / MIB for n in (*parts, memory.peak, measured, rest)]
        table.append((name, *cells))
    whose = "" if other is None else f" for {other.model_type} in {model}"
    same = "the largest step of each run" if length is None else f"rows of {length} tokens"
    return Analysis(
        title=f"memory of training{whose}, in MiB",
        columns=(
            Column("run"),
            *(
                Column(word, "MiB")
                for word in ("frozen", "trained", "gradients", "optimizer", "kept", "estimate")
            ),
            Column("measured", "MiB"),
            Column("rest", "MiB"),
        ),
        rows=tuple(table),
        notes=(f"Estimated for {same}.", *NOTES),
        figures=(
            Figure(
                title="Peak memory of training",
                caption="MiB; the estimate counts tensors, the measurement the whole process.",
                x=Axis("run", "category"),
                y=Axis("MiB"),
                traces=(
                    bars("estimate", names, [row[6] for row in table]),
                    *(() if other else (bars("measured", names, [row[7] for row in table]),)),
                ),
            ),
        ),
    )


def _config(folder: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(f"--model={folder}: no folder with a model's config ({reason})") from error

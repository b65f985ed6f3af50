"""What training cost elsewhere: how the loss on another text changed, and for what gain.

    forgotten = loss on the source text after training - before     gain = base - loss on the data

all in bits per token. The source is another data set of conf/dataset, text that the model knew
before. Forgetting is a cost of learning: runs can be compared where one gains as much as another.

Source: Biderman et al. 2024, arXiv:2405.09673 ("LoRA learns less and forgets less").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import yaml

from peftlab.analysis import (
    Analysis,
    Axis,
    Cell,
    Column,
    Figure,
    Option,
    but_seed,
    labels,
    line,
    same_model,
)
from peftlab.backbone import Backbone
from peftlab.bits import Tally
from peftlab.config import HOME
from peftlab.errors import InputError, require
from peftlab.fit import evaluate
from peftlab.parts import base_of, data_of, method_of
from peftlab.recorded import Record, restore
from peftlab.sites import most_positions

OPTIONS = (
    Option("source", str, "kjv", "a data set of conf/dataset, not the one of the runs"),
    Option("rows", int, 40, "how many rows of it, the first of its train split"),
)
NOTES = (
    "forgotten: above 0, the adapted model predicts the source text worse than the frozen one did.",
    "One source text is not all that a model knew, and one run has no spread: see several seeds.",
)


def dataset(name: str) -> dict:
    """Return the config group of the data set `name`. Raises: InputError for an unknown one."""
    known = sorted(path.stem for path in (HOME / "conf" / "dataset").glob("*.yaml"))
    require(name in known, "--source", name, f"one of {', '.join(known)}")
    return yaml.safe_load((HOME / "conf" / "dataset" / f"{name}.yaml").read_text())


def fitting(text: dict, backbone: Backbone, runs: Sequence[Record]) -> dict:
    """Return the source with rows no longer than the model has positions beside any run's own."""
    taken = max(method_of(run.config, backbone).n_positions for run in runs)
    most = most_positions(backbone.net) - taken
    return {**text, "block_length": int(min(text["block_length"], most))}


def source_loss(run: Record, backbone: Backbone, source: dict, rows: int) -> Tally:
    """Return nats and targets of the source's first rows, by the backbone as it is."""
    data = data_of({**run.config, "dataset": source}, backbone)
    batches = data.batches(replace(data.train, examples=data.train.examples[:rows]))
    autocast = run.config["precision"] == "bf16"
    with torch.no_grad():
        return evaluate(backbone.net, batches, backbone.loss, autocast=autocast)


def analyse(runs: Sequence[Record], *, source: str, rows: int) -> Analysis:
    """Evaluate the source before and after every run.

    Raises: InputError for runs of several models or data sets, or trained on the source itself.
    """
    require(rows >= 1, "--rows", rows, "a whole number from 1")
    same_model(runs)
    text = dataset(source)
    told = f"a run on the data of {runs[0].folder}, as the others: their gains are compared"
    for run in runs:
        own, first = (r.result["dataset"]["fingerprint"] for r in (run, runs[0]))
        require(own == first, "RUN", run.folder, told)
        if run.config["dataset"]["source"] == text["source"] and not text["path"]:
            raise InputError(f"--source={source}: another data set than the one of {run.folder}")
    before: dict[str, float] = {}
    table: list[tuple[Cell, ...]] = []
    for name, run in zip(labels(runs), runs, strict=True):
        precision = run.config["precision"]
        if precision not in before:
            model = {**run.config["model"], "device": "auto"}
            bare = base_of({**run.config, "model": model})
            text = fitting(text, bare, runs)
            before[precision] = source_loss(run, bare, text, rows).bits_per_token
        after = source_loss(run, restore(run), text, rows).bits_per_token
        gains = [
            run.result["base"][f"{split}_bits_per_token"]
            - run.result["final"][f"{split}_bits_per_token"]
            for split in ("train", "test")
        ]
        trained = run.result["method"]["trainable_params"]
        numbers = before[precision], after, after - before[precision]
        table.append((name, trained, *numbers, *gains))
    seeds: dict[str, list[tuple[Cell, ...]]] = {}
    for row in table:
        seeds.setdefault(but_seed(str(row[0])), []).append(row)
    return Analysis(
        title=f"what was forgotten of {source}, and what was gained",
        columns=(
            Column("run"),
            Column("parameters", "trained"),
            Column("before", "bits/token"),
            Column("after", "bits/token"),
            Column("forgotten", "bits/token"),
            Column("gain, train", "bits/token"),
            Column("gain, test", "bits/token"),
        ),
        rows=tuple(table),
        notes=(
            f"Source: the first {rows} rows of the train split of {source}, each cut to "
            f"{text['block_length']} tokens.",
            *NOTES,
        ),
        figures=(
            Figure(
                title=f"Gain against what was forgotten of {source}",
                caption="Right is more learned, up is more forgotten; a point is a run.",
                x=Axis("gain on the test split, bits per token"),
                y=Axis("forgotten, bits per token"),
                traces=tuple(
                    line(name, [row[6] for row in own], [row[4] for row in own], mode="markers")
                    for name, own in seeds.items()
                ),
            ),
        ),
    )

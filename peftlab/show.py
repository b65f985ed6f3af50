"""What a run shows: a progress bar on a terminal, plain lines elsewhere, and the closing table."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from peftlab.bits import perplexity
from peftlab.fit import Row

PLAIN_LINES = 12  # progress lines per run where there is no terminal


class Show:
    """Shows rows as they come. Use as a context manager."""

    def __init__(self, total_steps: int, *, done: int) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.total = total_steps
        self.every = max(1, total_steps // PLAIN_LINES)
        self.live = self.console.is_terminal
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.live,
        )
        self.task = self.bar.add_task("training", total=total_steps, completed=done)

    def __enter__(self) -> Show:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def row(self, row: Row) -> None:
        """Show one row."""
        if row.phase == "eval":
            when = "before training" if row.step == 0 else f"after epoch {row.epoch}"
            self.line(f"{row.split} {when}: {row.bits_per_token:.4f} bits per token")
            return
        text = f"epoch {row.epoch}, loss {row.bits_per_token:.3f} bits per token"
        self.bar.update(self.task, completed=row.step, description=text)
        if not self.live and row.step % self.every == 0:
            self.line(f"step {row.step}/{self.total}: {text}")

    def line(self, text: str) -> None:
        """Show one line above the progress bar."""
        self.console.print(text, markup=False, soft_wrap=True)


def show_result(result: Mapping, folder: Path) -> None:
    """Print the closing table of a run to stdout."""
    console = Console(highlight=False)
    model, method, data = result["model"], result["method"], result["dataset"]
    title = f"{method['name']} on {model['name']}, data {data['name']}: {result['status']}"
    if result["error"]:
        console.print(f"{title}\n{result['error']}", markup=False, soft_wrap=True)
    if result["status"] == "completed":
        console.print(_losses(result, title))
        console.print(_costs(result))
    where = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else folder
    console.print(f"results: {where}", markup=False, soft_wrap=True)


def _losses(result: Mapping, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("", "train", "test"):
        table.add_column(column, justify="left" if not column else "right")
    for name, key in (("base model", "base"), ("after training", "final")):
        bits = [result[key][f"{split}_bits_per_token"] for split in ("train", "test")]
        table.add_row(f"{name}, bits per token", *(f"{b:.4f}" for b in bits))
        table.add_row(f"{name}, perplexity", *(f"{perplexity(b):.2f}" for b in bits))
    return table


def _costs(result: Mapping) -> Table:
    table = Table(show_header=False)
    cost, method = result["cost"], result["method"]
    share = 100 * cost["trainable_fraction"]
    total = result["model"]["total_params"]
    table.add_row(
        "trained parameters", f"{method['trainable_params']:,} of {total:,} ({share:.3g} %)"
    )
    table.add_row("training time", f"{cost['train_seconds']:.0f} s")
    table.add_row(
        "speed", f"{cost['tokens_per_second']:.0f} tokens/s, {result['provenance']['precision']}"
    )
    table.add_row("peak memory", f"{cost['peak_memory_bytes'] / 2**30:.2f} GiB")
    merge = result["merge"]
    if merge is None:
        error = "trained in place" if method["mergeable"] else "cannot be merged"
    else:
        verdict = "within" if merge["ok"] else "ABOVE"
        allowed = f"{verdict} the tolerance of {merge['tolerance']:.0e}"
        error = f"{merge['max_abs_logit_diff']:.1e} in a logit, {allowed}"
    table.add_row("merge error", error)
    return table


def try_next(result: Mapping) -> str:
    """One line of advice after a single run."""
    name = result["method"]["name"]
    other = "lora" if name != "lora" else "tied_lora"
    data = "cmudict" if result["dataset"]["name"] != "cmudict" else "bfcl"
    return (
        f"try next: peftlab train method={other}  |  peftlab train dataset={data}  |  "
        f"peftlab train -m +sweeps=lr method={name} model=tiny_gpt2  |  peftlab methods"
    )


def warn(text: str) -> None:
    """Print one line to stderr."""
    print(text, file=sys.stderr, flush=True)

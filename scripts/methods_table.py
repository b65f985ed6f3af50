"""Run every method once on SmolLM2 and on tiny_gpt2, with its defaults, and write the table.

    python scripts/methods_table.py OUTPUT > docs/runs.md

Two runs at a time, one thread each; about half an hour on two cores. Finished runs in OUTPUT are
kept: the same command goes on. A run that does not end `completed` and below its base is marked.
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peftlab.cards import card, method_names

TASKS = {
    "SmolLM2-135M": [
        "model=smollm2",
        "dataset=chatterbot",
        "dataset.train_size=16",
        "dataset.test_size=8",
        "batch=4",
    ],
    "tiny_gpt2": [
        "model=tiny_gpt2",
        "dataset=cmudict",
        "dataset.train_size=100",
        "dataset.test_size=25",
    ],
}
COMMON = ["threads=1", "tracking=none", "precision=bf16", "skip_finished=true"]
BIASES = "bitfit"  # Llama has none to train unless it is given some
EXTRA = {  # settings that are no methods of their own
    "lora, NF4 (QLoRA)": ["method=lora", "model.quantize=nf4"],
    "full, GaLore": ["method=full", "optimizer=galore", "optimizer.lr=3e-4"],
    "lora, LoRA+": ["method=lora", "optimizer=loraplus"],
}


def main(output: Path) -> int:
    """Run what is missing and print the page; return 1 if a run is not as it should be."""
    settings = {name: [f"method={name}"] for name in method_names()} | EXTRA
    jobs = [
        (task, label, [*COMMON, *overrides, *more, f"hydra.run.dir={_folder(output, task, label)}"])
        for task, overrides in TASKS.items()
        for label, more in settings.items()
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, [job for job in jobs if _result(_folder(output, *job[:2])) is None]))
    print(HEAD)
    good = True
    for task, overrides in TASKS.items():
        results = {label: _result(_folder(output, task, label)) for label in settings}
        good &= all(map(_as_it_should_be, results.values()))
        base = next(r["base"] for r in results.values() if r and r["base"])
        before = " and ".join(f"{base[f'{s}_bits_per_token']:.3f} ({s})" for s in ("train", "test"))
        print(f"\n## {task}\n\n`{' '.join(overrides)}`; the bare model: {before} bits per token.\n")
        print("| setting | family | lr | trained | train | test | seconds | peak MiB | merge |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
        for label, result in results.items():
            print("|", " | ".join(_cells(label, result)), "|")
    return 0 if good else 1


def train(job: tuple[str, str, list[str]]) -> None:
    """Run `peftlab train` in a process of its own, unless it has finished before."""
    task, label, overrides = job
    if label == BIASES and task == "SmolLM2-135M":
        overrides = [*overrides, "method.create=true"]
    command = [sys.executable, "-m", "peftlab", "train", *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(f"{task}, {label}: exit code {done.returncode}\n{done.stdout}", file=sys.stderr)


def _folder(output: Path, task: str, label: str) -> Path:
    return output / task / re.sub(r"\W+", "-", label)  # a comma would mean something to Hydra


def _result(folder: Path) -> dict | None:
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def _as_it_should_be(result: dict | None) -> bool:
    return result is not None and result["status"] == "completed" and _gain(result) > 0


def _gain(result: dict) -> float:
    return result["base"]["train_bits_per_token"] - result["final"]["train_bits_per_token"]


def _cells(label: str, result: dict | None) -> list[str]:
    method = label if label in method_names() else label.split(",")[0]
    family = card(method).family
    if result is None or result["final"] is None:
        return [label, family, *[""] * 6, "failed" if result is None else result["status"]]
    merge = result["merge"]
    return [
        label,
        family,
        f"{result['optimizer']['lr']:g}",
        f"{result['method']['trainable_params']:,}",
        f"{result['final']['train_bits_per_token']:.3f}" + (" (!)" if _gain(result) <= 0 else ""),
        f"{result['final']['test_bits_per_token']:.3f}",
        f"{result['cost']['train_seconds']:.0f}",
        f"{result['cost']['peak_memory_bytes'] / 2**20:,.0f}",
        "-" if merge is None else "ok" if merge["ok"] else f"off by {merge['max_abs_logit_diff']}",
    ]


HEAD = """# One run of each method

Written by `python scripts/methods_table.py OUTPUT > docs/runs.md`: every method once with its
defaults, three epochs, seed 0, bf16, one thread beside another run. It shows that each works on
both architectures, not which is best: **the methods are not tuned here**, the data is small, and
there is one seed. Bits per token of the whole splits; seconds of the training steps; peak resident
memory of the process; merge: whether the merged weights compute the same (- if there is nothing
to merge). Seconds were taken beside other work: an order of magnitude, no comparison."""

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))

"""Time one whole study against the stack that a user would otherwise assemble.

    python scripts/bench.py study
    python scripts/bench_study.py [--rounds 2] [--rows 48] [--data dataset=cmudict ...]

The same 24 points of a γ-LoRA study (lr, γ, rank) of SmolLM2-135M by both, each from the same
random factors, on the same rows in the same batches and order, with the same objective (bits per
token of the whole train split after three epochs), so that both have one best loss to find:
- stock: hydra-optuna-sweeper 1.3.0 with optuna 2.10 in memory, HF peft, a plain loop, float32, one
  process with all cores; it gets an environment of its own, by pip, and torch, transformers and
  peft from this one;
- peftlab: +sweeps=tune with pruning, one worker per core; in float32, and in bf16 where the
  processor multiplies it (`precision: auto`).

They take turns, A B A B; a round takes 20 minutes. Prints a table. Nothing else should run.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import cast

import hydra
import yaml
from safetensors.torch import save_file

from peftlab.bits import IGNORE
from peftlab.data import Batch
from peftlab.method import SiteMethod

STOCK = ["hydra-optuna-sweeper==1.3.0", "optuna==2.10.1", "hydra-core==1.3.2"]
CORES = os.cpu_count() or 1
# In the order of the method's own ranges, in which peftlab's grid takes them, the last one fastest.
SPACE = {"lr": (1e-2, 1e-3, 1e-4, 1e-5), "gamma": (1, 30, 1000), "rank": (4, 16)}
TRIALS = math.prod(map(len, SPACE.values()))
APP = """
import json
import math
from pathlib import Path

import hydra
import peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

DATA = json.loads(Path("data.json").read_text())
torch.set_num_threads(DATA["threads"])


def collate(rows):
    width = max(len(ids) for ids, _ in rows)
    fill = lambda values, pad: values + [pad] * (width - len(values))
    ids = torch.tensor([fill(ids, 0) for ids, _ in rows])
    labels = torch.tensor([fill(labels, -100) for _, labels in rows])
    mask = torch.tensor([fill([1] * len(ids), 0) for ids, _ in rows])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def task(config):
    model = AutoModelForCausalLM.from_pretrained(DATA["model"], dtype=torch.float32)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=3 * config.gamma,
            use_rslora=True,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    ).train()
    starts = load_file(f"rank{config.rank}.safetensors")
    for name, tensor in model.named_parameters():
        if "lora_A" in name:
            site = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            tensor.data.copy_(starts[site] / config.gamma)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=0.0)
    for step, rows in enumerate(DATA["steps"]):
        done = step / len(DATA["steps"])
        optimizer.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * done)) / 2
        model(**collate(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    nats, targets = 0.0, 0
    with torch.no_grad():
        for i in range(0, len(DATA["rows"]), 8):
            inputs = collate(DATA["rows"][i : i + 8])
            n = int((inputs["labels"][:, 1:] != -100).sum())
            nats += model(**inputs).loss.item() * n
            targets += n
    bits = nats / (math.log(2) * targets)
    return bits if math.isfinite(bits) else 100.0


if __name__ == "__main__":
    hydra.main(version_base="1.3", config_path=".", config_name="app")(task)()
"""


def main() -> int:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--data", nargs="+", default=["dataset=cmudict"], metavar="OVERRIDE")
    parser.add_argument("--pruners", nargs="+", default=["asha"], help="of peftlab's sweep; asha")
    both = "of peftlab's sweep; fp32, and bf16 where the processor multiplies it"
    parser.add_argument("--precisions", nargs="+", help=both)
    study(**vars(parser.parse_args()))
    return 0


def study(
    rounds: int = 2,
    rows: int = 48,
    data: Sequence[str] = ("dataset=cmudict",),
    pruners: Sequence[str] = ("asha",),
    precisions: Sequence[str] | None = None,
) -> dict[str, list[dict]]:
    """Run the studies in turn; print and return how long each took and what it found."""
    overrides = [*data, f"dataset.train_size={rows}", "dataset.test_size=8"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_steps = write_inputs(folder, overrides)
        stock = install_stock(folder / "environment")
        (folder / "app.py").write_text(APP)
        (folder / "app.yaml").write_text("lr: 1e-4\ngamma: 1.0\nrank: 8\n")
        n_trials = f"hydra.sweeper.n_trials={TRIALS}"
        theirs = [str(stock), "app.py", "-m", "hydra/sweeper=optuna", n_trials]
        theirs += ["hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=1"]
        theirs += space(lr="lr", gamma="gamma", rank="rank")
        ours = [sys.executable, "-m", "peftlab", "train", "-m", "+sweeps=tune", *overrides]
        ours += ["method=gamma_lora", "tracking=none", n_trials, "hydra/sweeper/sampler=grid"]
        ours += ["hydra/launcher=peftlab_workers", f"hydra.launcher.n_jobs={CORES}"]
        ours += space(lr="optimizer.lr", gamma="method.gamma", rank="method.rank")
        stacks = {"stock": (theirs, CORES)}
        for pruner, precision in product(pruners, precisions or precisions_here()):
            words = [f"hydra/sweeper/pruner={pruner}", f"precision={precision}"]
            stacks[f"peftlab, {pruner}, {precision}"] = ([*ours, *words], 1)
        print(
            f"{TRIALS} trials of {n_steps} steps, {rows} rows of {' '.join(data)}, {CORES} cores\n"
        )
        print("| round | stack | minutes | x stock | best train bits per token | at | pruned |")
        print("| ---: | --- | ---: | ---: | ---: | --- | ---: |")
        found: dict[str, list[dict]] = {label: [] for label in stacks}
        for turn in range(1, rounds + 1):
            for i, (label, (command, threads)) in enumerate(stacks.items()):
                results = f"study_{turn}_{i}"  # a new study each time: none goes on
                words = [*command, f"hydra.sweep.dir={results}"]
                words += [f"study={results}"] if label != "stock" else []
                found[label].append(timed(folder, words, results, threads=threads))
                tell(turn, label, found[label][-1], found["stock"][-1])
    for label in list(stacks)[1:]:
        pairs = zip(found[label], found["stock"], strict=True)
        ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in pairs]
        spread = f"{min(ratios):.3f}..{max(ratios):.3f}"
        print(f"\n{label}: {statistics.median(ratios):.3f} of stock's time ({spread})")
    return found


def precisions_here() -> list[str]:
    """Return those worth measuring: bf16 where `precision: auto` is that, and float32."""
    import torch

    from peftlab.backbone import fast_bf16

    return ["bf16", "fp32"] if fast_bf16(torch.device("cpu")) else ["fp32"]


def tell(turn: int, stack: str, study: Mapping, stock: Mapping) -> None:
    """Print a row of the table."""
    point = sorted((key.split(".")[-1], value) for key, value in study["best_params"].items())
    cells = [str(turn), stack, f"{study['seconds'] / 60:.1f}"]
    cells += [f"{study['seconds'] / stock['seconds']:.3f}", f"{study['best_value']:.4f}"]
    cells += [", ".join(f"{key} {value}" for key, value in point)]
    cells += [str(study["n_trials"]["pruned"]) if "n_trials" in study else ""]
    print("|", " | ".join(cells), "|", flush=True)


def space(**names: str) -> list[str]:
    """Return the search space as overrides of keys of these names."""
    return [f"{names[key]}=choice({','.join(map(str, SPACE[key]))})" for key in SPACE]


def write_inputs(folder: Path, words: list[str]) -> int:
    """Write what the stock stack shall start from and train on; return the number of steps.

    The rows of every step, the train split, where the model is, and the random factors of each
    rank for γ = 1.
    """
    from peftlab.config import resolve
    from peftlab.parts import base_of, data_of, method_of
    from peftlab.train import CONF

    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        configs = {
            rank: resolve(
                hydra.compose(
                    "config",
                    [*words, "method=gamma_lora", f"method.rank={rank}", "method.gamma=1"],
                )
            )
            for rank in SPACE["rank"]
        }
    config = configs[SPACE["rank"][0]]
    backbone = base_of(config | {"precision": "fp32"})
    data = data_of(config, backbone)
    for rank in SPACE["rank"]:
        method = cast(SiteMethod, method_of(configs[rank], backbone))
        factors = zip(method.sites, method.tensors, strict=True)
        save_file({s.name: t.A.detach() for s, t in factors}, folder / f"rank{rank}.safetensors")
    steps = [step for epoch in range(config["epochs"]) for step in data.steps(epoch)]
    facts = {
        "model": str(backbone.folder),
        "steps": [[row for batch in step for row in rows_of(batch)] for step in steps],
        "rows": [row for batch in data.batches(data.train) for row in rows_of(batch)],
        "threads": CORES,
    }
    (folder / "data.json").write_text(json.dumps(facts))
    return len(steps)


def rows_of(batch: Batch) -> Iterator[tuple[list[int], list[int]]]:
    """Yield ids and labels of each row, for a model that shifts the labels itself."""
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        n = int((targets != IGNORE).nonzero().max()) + 1
        yield [*ids[:n].tolist(), int(targets[n - 1])], [IGNORE, *targets[:n].tolist()]


def install_stock(folder: Path) -> Path:
    """Make an environment with the stock plugin; torch and peft come from this one."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *STOCK], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def timed(folder: Path, command: list[str], results: str, *, threads: int) -> dict:
    """Run a sweep in `folder`; return its seconds and what it wrote into the folder `results`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment.pop("GOMP_SPINCOUNT", None)  # which peftlab has set here, for itself alone
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    seconds = time.perf_counter() - started
    written = yaml.safe_load((folder / results / "optimization_results.yaml").read_text())
    return {"seconds": seconds, **written}


if __name__ == "__main__":
    sys.exit(main())

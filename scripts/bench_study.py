"""Time one whole study against the stack that a user would otherwise assemble: 15 minutes.

    python scripts/bench_study.py [--trials 24] [--rows 48] [--data dataset=cmudict ...]

A γ-LoRA study (lr, γ, rank) of SmolLM2-135M on the same rows, same steps, same objective (bits per
token of the whole train split after three epochs):
- stock: hydra-optuna-sweeper 1.3.0 with optuna 2.10 in memory, HF peft, a plain loop, float32, one
  process with all cores; it gets an environment of its own, by pip, and torch, transformers and
  peft from this one;
- peftlab: +sweeps=tune with pruning, one worker per core.

Prints a table. Nothing else should run.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

import hydra
import yaml

STOCK = ["hydra-optuna-sweeper==1.3.0", "optuna==2.10.1", "hydra-core==1.3.2"]
CORES = os.cpu_count() or 1
LR, GAMMA, RANKS = (1e-5, 1e-2), (1, 1000), (2, 4, 8, 16)
APP = """
import json
import math
from pathlib import Path

import hydra
import peft
import torch
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
    torch.manual_seed(0)
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
    for name, tensor in model.named_parameters():
        if "lora_A" in name:
            tensor.data.normal_(std=1 / config.gamma)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=0.0)
    batches = [DATA["rows"][i : i + 8] for i in range(0, len(DATA["rows"]), 8)]
    total, step = 3 * len(batches), 0
    for epoch in range(3):
        for i in torch.randperm(len(batches)).tolist():
            optimizer.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * step / total)) / 2
            model(**collate(batches[i])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    model.eval()
    nats, targets = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            inputs = collate(batch)
            n = int((inputs["labels"][:, 1:] != -100).sum())
            nats += model(**inputs).loss.item() * n
            targets += n
    bits = nats / (math.log(2) * targets)
    return bits if math.isfinite(bits) else 100.0


if __name__ == "__main__":
    hydra.main(version_base="1.3", config_path=".", config_name="app")(task)()
"""
SPACE = [
    f"{{lr}}=tag(log,interval({LR[0]},{LR[1]}))",
    f"{{gamma}}=tag(log,interval({GAMMA[0]},{GAMMA[1]}))",
    f"{{rank}}=choice({','.join(map(str, RANKS))})",
]


def main() -> int:
    """Run both studies; print how long each took and what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--data", nargs="+", default=["dataset=cmudict"], metavar="OVERRIDE")
    parser.add_argument("--pruner", default="asha", help="of peftlab's sweep; asha")
    known = parser.parse_args()
    data = [*known.data, f"dataset.train_size={known.rows}", "dataset.test_size=8"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, data)
        stock = install_stock(folder / "stock")
        (folder / "app.py").write_text(APP)
        (folder / "app.yaml").write_text("lr: 1e-4\ngamma: 1.0\nrank: 8\n")
        words = " ".join(known.data)
        print(f"{known.trials} trials on {known.rows} rows of {words}, {CORES} cores\n")
        print("| stack | minutes | x stock | best train bits per token | pruned |")
        print("| --- | ---: | ---: | ---: | ---: |")
        n_trials = f"hydra.sweeper.n_trials={known.trials}"
        words = space(lr="lr", gamma="gamma", rank="rank")
        theirs = [str(stock), "app.py", "-m", "hydra/sweeper=optuna", n_trials, *words]
        theirs += ["hydra/sweeper/sampler=tpe"]
        theirs += ["hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=0", "hydra.sweep.dir=a"]
        first = timed(folder, theirs, threads=CORES)
        best = yaml.safe_load((folder / "a/optimization_results.yaml").read_text())["best_value"]
        print(f"| stock | {first / 60:.1f} | 1.00 | {best:.4f} | |", flush=True)
        words = space(lr="optimizer.lr", gamma="method.gamma", rank="method.rank")
        ours = [sys.executable, "-m", "peftlab", "train", "-m", "+sweeps=tune", *data, *words]
        ours += [
            "method=gamma_lora",
            "tracking=none",
            n_trials,
            f"hydra/sweeper/pruner={known.pruner}",
        ]
        ours += ["hydra/launcher=peftlab_workers", f"hydra.launcher.n_jobs={CORES}"]
        second = timed(folder, [*ours, "hydra.sweep.dir=b"], threads=1)
        found = yaml.safe_load((folder / "b/optimization_results.yaml").read_text())
        cells = [f"peftlab, {known.pruner}", f"{second / 60:.1f}", f"{second / first:.3f}"]
        cells += [f"{found['best_value']:.4f}", str(found["n_trials"]["pruned"])]
        print("|", " | ".join(cells), "|", flush=True)
    return 0


def space(**names: str) -> list[str]:
    """Return the search space as overrides of keys of these names."""
    return [word.format(**names) for word in SPACE]


def write_data(folder: Path, words: list[str]) -> None:
    """Write the tokenised train split and where the model is, for the stock stack."""
    from peftlab.backbone import load_backbone
    from peftlab.config import resolve
    from peftlab.data import load_data
    from peftlab.train import CONF

    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        config = resolve(hydra.compose("config", words))
    backbone = load_backbone(config["model"], precision="fp32", block_length=128)
    data = load_data(
        config["dataset"],
        tokenizer=backbone.tokenizer,
        tokenizer_id=backbone.tokenizer_id(),
        seed=0,
        batch=8,
        micro_batch=8,
    )
    # HF shifts the labels itself: the label of a token stands at the token
    rows = []
    for example in data.train.examples:
        ids, targets = example.ids.tolist(), example.targets.tolist()
        rows.append([[*ids, targets[-1]], [-100, *targets]])
    facts = {"model": str(backbone.folder), "rows": rows, "threads": CORES}
    (folder / "data.json").write_text(json.dumps(facts))


def install_stock(folder: Path) -> Path:
    """Make an environment with the stock plugin; torch and peft come from this one."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *STOCK], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def timed(folder: Path, command: list[str], *, threads: int) -> float:
    """Run a command in `folder`; return its seconds. Its output is shown only if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())

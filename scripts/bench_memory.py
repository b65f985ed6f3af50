"""Measure the peak memory of training SmolLM2, per method and optimizer, beside the estimate.

    python scripts/bench_memory.py > docs/memory.md        about ten minutes on two cores

Each row is one `peftlab train` in a process of its own, over packed rows, so that every batch is
full; its peak is the largest resident set from the end of loading on.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import hydra
from transformers import AutoConfig

from peftlab.backbone import load_backbone
from peftlab.config import resolve
from peftlab.estimate import estimate
from peftlab.train import CONF

ROWS, LENGTH = 2, 128
COMMON = [
    "model=smollm2",
    "dataset=bfcl",
    f"dataset.block_length={LENGTH}",
    "dataset.packing=true",
    "dataset.loss_on=all",
    "dataset.train_size=16",
    "dataset.test_size=4",
    "epochs=1",
    f"batch={ROWS}",
    "precision=bf16",
    "tracking=none",
]
SETTINGS = {
    "full": ["method=full"],
    "full, GaLore": ["method=full", "optimizer=galore"],
    "full, GaLore per layer": ["method=full", "optimizer=galore", "optimizer.per_layer=true"],
    "top_layers": ["method=top_layers"],
    "lora": ["method=lora"],
    "lora, NF4 (QLoRA)": ["method=lora", "model.quantize=nf4"],
    "bitfit": ["method=bitfit", "method.create=true"],
    "ladder": ["method=ladder"],
}
MIB = 2**20


def main() -> int:
    """Print the page."""
    print(HEAD)
    for label, overrides in SETTINGS.items():
        with hydra.initialize_config_dir(CONF, version_base="1.3"):
            config = resolve(hydra.compose("config", [*COMMON, *overrides]))
        bare = config["model"] | {"quantize": None}
        folder = load_backbone(bare, precision="bf16", block_length=LENGTH).folder
        memory = estimate(
            AutoConfig.from_pretrained(folder),
            config["method"],
            config["optimizer"],
            rows=ROWS,
            length=LENGTH,
            precision=config["precision"],
            quantize=config["model"]["quantize"],
        )
        result = measure([*COMMON, *overrides])
        peak = result["cost"]["peak_memory_bytes"]
        parts = [
            memory.frozen + memory.trained,
            memory.gradients,
            memory.optimizer,
            memory.activations + memory.loss,
            memory.peak,
            peak,
            peak - memory.peak,
        ]
        cells = [label, f"{result['method']['trainable_params']:,}"]
        print("|", " | ".join([*cells, *(f"{part / MIB:,.0f}" for part in parts)]), "|", flush=True)
    print(FOOT)
    return 0


def measure(overrides: list[str]) -> dict:
    """Train once, in a process and a folder of its own; return the result."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "peftlab", "train", *overrides, "hydra.run.dir=run"]
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
        return json.loads((Path(folder) / "run" / "result.json").read_text())


HEAD = f"""# Memory of training

Written by `python scripts/bench_memory.py > docs/memory.md`. SmolLM2-135M in bf16 on a CPU, batches
of {ROWS} rows of {LENGTH} tokens, every default of the method otherwise. All in MiB.

*Kept* is what the forward pass keeps for backward. *Estimated*, the peak by `peftlab.estimate`: one
forward pass over tensors without data, each kept storage counted once; weights + optimizer state +
the larger of kept and gradients. *Measured* is the largest resident set of the process after
loading. *Rest* is their difference: Python, torch and its threads, copies that live for one
operation, and memory that the allocator has not given back.

| setting | trained | weights | gradients | optimizer | kept | estimated | measured | rest |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""
FOOT = """
NF4 halves what is stored; the measured peak of this small model did not fall with it on a CPU, and
why was not looked into. Ladder and top_layers save what is kept for backward, GaLore
the optimizer's state, and its updates within backward the gradients."""

if __name__ == "__main__":
    sys.exit(main())

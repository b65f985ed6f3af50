"""Estimate memory and time of a training step for models of 1, 8 and 70 billion parameters.

    python scripts/estimate_sizes.py TOKENS_PER_S [METHOD ...]

TOKENS_PER_S: those of a LoRA step on SmolLM2, measured here by `scripts/bench.py steps`. Every
method unless some are named. Half a minute of a core for each, minutes where cost is no straight
line in the number of layers: what lies on one for 6, 8 and 10 layers is taken to go on so.

Memory is `peftlab.estimate`: shapes only. Time is the number of floating-point operations of the
step, counted over tensors without data, at the rate that the measured step had: it assumes that a
larger model keeps the processor as busy as the small one does, and that it fits into memory. The
shapes are those of Llama 3.2 1B, 3.1 8B and 3.1 70B.
"""

import sys
from collections.abc import Mapping
from copy import copy
from dataclasses import astuple

import hydra
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from peftlab.backbone import locate
from peftlab.cards import method_names
from peftlab.config import resolve
from peftlab.errors import InputError
from peftlab.estimate import Memory, estimate, step_flops
from peftlab.train import CONF

ROWS, LENGTH = 8, 128
MODELS = {  # hidden, layers, heads, key-value heads, intermediate, tied embeddings
    "1B": (2048, 16, 32, 8, 8192, True),
    "8B": (4096, 32, 32, 8, 14336, False),
    "70B": (8192, 80, 64, 8, 28672, False),
}
LAYERS = 6, 8, 10
WHERE = {"rows": ROWS, "length": LENGTH, "precision": "bf16"}
GIB = 2**30


def main() -> int:
    """Print the table."""
    rate = float(sys.argv[1])
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        names = dict.fromkeys(["lora", *(sys.argv[2:] or method_names())])  # LoRA gives the rate
        configs = {name: resolve(hydra.compose("config", [f"method={name}"])) for name in names}
    smollm2 = AutoConfig.from_pretrained(locate(configs["lora"]["model"])[0])
    models = {"SmolLM2": smollm2, **{name: llama(*sizes) for name, sizes in MODELS.items()}}
    tokens = ROWS * LENGTH
    flops_per_s = whole(smollm2, configs["lora"])[0] * rate / tokens
    print(f"{ROWS} x {LENGTH} tokens, bf16, {flops_per_s / 1e9:,.0f} GFLOP/s\n")
    heads = [f"{name}: {what}" for name in models for what in ("GiB", "s per 1,000 tokens")]
    print("| method |", " | ".join(heads), "|")
    print("| --- |", " | ".join(["---:"] * len(heads)), "|")
    for name, config in configs.items():
        cells = []
        for model in models.values():
            try:
                flops, memory = cost(model, config)
            except InputError as error:
                print(f"{name}: {error}", file=sys.stderr)
                cells += ["-", "-"]
                continue
            seconds = flops / flops_per_s / tokens * 1000
            cells += [f"{memory.peak / GIB:,.1f}", f"{seconds:,.1f}"]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)
    return 0


def cost(model: PretrainedConfig, config: Mapping) -> tuple[float, Memory]:
    """Return operations and memory of a step, from fewer layers where both grow by a line."""
    if model.num_hidden_layers <= max(LAYERS):
        return whole(model, config)
    points = []
    for layers in LAYERS:
        fewer = copy(model)
        fewer.num_hidden_layers = layers
        flops, memory = whole(fewer, config)
        points.append((flops, *astuple(memory)))
    first, second, third = points
    if any(b - a != c - b for a, b, c in zip(first, second, third, strict=True)):
        return whole(model, config)
    steps = (model.num_hidden_layers - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
    flops, *sizes = (a + (b - a) * steps for a, b in zip(first, second, strict=True))
    return flops, Memory(*map(round, sizes))


def whole(model: PretrainedConfig, config: Mapping) -> tuple[int, Memory]:
    """Return operations and memory of a step, all layers counted."""
    groups = config["method"], config["optimizer"]
    return step_flops(model, *groups, **WHERE), estimate(model, *groups, **WHERE)


def llama(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, tied: bool
) -> LlamaConfig:
    """Return the config of a Llama of these sizes."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
    )


if __name__ == "__main__":
    sys.exit(main())

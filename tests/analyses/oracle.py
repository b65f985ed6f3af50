"""Changes of low-rank runs from their files alone: numpy, no code of the package."""

import json

import numpy as np
import yaml
from safetensors.numpy import load_file


def low_rank_changes(folder):
    """Return layer -> (alpha / rank) B A of a run of LoRA, float64."""
    method = yaml.safe_load((folder / "config.yaml").read_text())["method"]
    tensors = load_file(folder / "adapter.safetensors")
    scale = method["alpha"] / method["rank"]
    found = {}
    for name, A in tensors.items():
        if name.startswith("peft.A."):
            B = tensors[name.replace("peft.A.", "peft.B.")].astype(float)
            layer = name.removeprefix("peft.A.").replace("/", ".")
            found[layer] = scale * B @ A.astype(float)
    return found


def weights(name="tiny_gpt2"):
    """Return layer -> frozen W [d_out, d_in] of the bundled GPT-2, whose file has [d_in, d_out]."""
    from peftlab.config import PACKAGE

    (file,) = (PACKAGE / "assets" / name).glob("*.safetensors")
    tensors = load_file(file)
    return {
        key.removesuffix(".weight"): value.T.astype(float)
        for key, value in tensors.items()
        if key.endswith(".weight") and value.ndim == 2 and ".h." in key
    }


def result(folder):
    """Return result.json."""
    return json.loads((folder / "result.json").read_text())


def spaces(delta):
    """Return U, s, V with vectors as columns."""
    U, s, Vh = np.linalg.svd(delta, full_matrices=False)
    return U, s, Vh.T

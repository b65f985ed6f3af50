"""Convert a GGUF model to safetensors, in a process of its own: python -m peftlab.gguf FILE OUT.

The converter needs three times the memory of the model, which would count as the run's.
"""

import contextlib
import io
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging


def convert(gguf: Path, out: Path, name: str) -> None:
    """Write model (float32) and tokenizer of the file `gguf` to `out`, in Hugging Face layout."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with contextlib.redirect_stderr(io.StringIO()):  # a bar of a few seconds, on every log line
        net = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # otherwise it counts as quantised
        )
    net.config.name_or_path = name  # the file's own display name is another model's
    net.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

"""Convert a GGUF model to safetensors, in a process of its own: python -m peftlab.gguf FILE OUT.

The converter needs three times the memory of the model, which would count as the run's.
"""

import contextlib
import ctypes
import io
import signal
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


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


def end_with_parent() -> None:
    """Have the kernel end this process with the one that waits for it, even if that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    end_with_parent()
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

"""Compile each decoder block by itself: one graph serves all blocks of a model.

Compiling costs seconds and saves a part of each step, so that a short run is faster without it.
The compiled kernels stay in the cache: the next process need not make them again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import torch
from torch import nn
from torch.fx.experimental import _config as shapes
from transformers import PreTrainedModel

from peftlab.errors import InputError
from peftlab.files import cache_dir
from peftlab.sites import decoder_blocks

# Floating-point operations of a run from which `compile: auto` compiles: some five minutes on two
# CPU cores, of which it saves about a minute, for at most half a minute of compiling.
WORTH_IT = 3e13


def compile_blocks(net: PreTrainedModel) -> None:
    """Have the decoder blocks of `net`, a method attached, compiled when they are next called.

    Raises: InputError where there is no C++ compiler, or no list of decoder blocks.
    """
    if compiler() is None:
        raise InputError("compile=true: needs a C++ compiler, g++ or clang++; compile=false none")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
    # A batch as long as a head is wide by chance would pass for tied to it, and compile again.
    shapes.use_duck_shape = False
    for block in _blocks(net):
        block.compile(dynamic=True)


def plain_blocks(net: PreTrainedModel) -> None:
    """Undo `compile_blocks`, if it was done."""
    compiled = [module for module in net.modules() if module._compiled_call_impl is not None]
    for module in compiled:
        module._compiled_call_impl = None
    if compiled:  # another method's blocks are the same code, which is compiled only so often
        torch.compiler.reset()


def worth_it(n_params: int, n_tokens: int) -> bool:
    """Whether training on n_tokens is long enough for compiling to pay, and a compiler is here."""
    return 6 * n_params * n_tokens >= WORTH_IT and compiler() is not None


def compiler() -> str | None:
    """Return the C++ compiler that torch would call."""
    return next(filter(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")), None)


def _blocks(net: PreTrainedModel) -> Iterator[nn.Module]:
    name, _ = decoder_blocks(net)
    return iter(net.get_submodule(name).children())

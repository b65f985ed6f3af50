"""Compile each decoder block by itself: one graph serves all blocks of a model.

Compiling costs seconds and saves a part of each step, so that a short run is faster without it.
Graphs and kernels stay in the cache: the next process only has to look at the Python code again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.fx.experimental import _config as shapes
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers import PreTrainedModel

from peftlab.errors import InputError
from peftlab.files import cache_dir
from peftlab.sites import blocks_of, touched

# Floating-point operations of a run from which `compile: auto` compiles: some five minutes on two
# CPU cores, of which it saves about a minute, for at most half a minute of compiling.
WORTH_IT = 3e13
# What torch does not take to be safe to keep. Their arguments are constants of the graph, hence of
# its key, and so is the autocast around it.
KEPT = ("torch.amp.autocast_mode._enter_autocast", "torch.amp.autocast_mode._exit_autocast")


def compile_blocks(net: PreTrainedModel) -> None:
    """Have the decoder blocks of `net`, a method attached, compiled when they are next called.

    Raises: InputError where there is no C++ compiler, or no list of decoder blocks.
    """
    if compiler() is None:
        raise InputError("compile=true: needs a C++ compiler, g++ or clang++; compile=false none")
    # torch sets the variable itself, when it is imported: any other value is the user's
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir() / "inductor")
    # A batch as long as a head is wide by chance would pass for tied to it, and compile again.
    shapes.use_duck_shape = False
    kept = inductor.unsafe_marked_cacheable_functions
    inductor.unsafe_marked_cacheable_functions = kept | dict.fromkeys(KEPT, torch.__version__)
    _no_symbols(net)
    blocks = blocks_of(net)
    for block in blocks:
        block.compile(dynamic=True)
    lowest = next(filter(_trains, blocks), None)
    if lowest is not None and (call := lowest._compiled_call_impl):
        lowest._compiled_call_impl = _with_gradient(call)


def _trains(block: nn.Module) -> bool:
    """Whether anything in a block is trained. A hook of the block as a whole may be a reader's."""
    trained = any(p.requires_grad for p in block.parameters())
    return trained or any(touched(module) for module in block.modules() if module is not block)


def _with_gradient(block: Callable[..., Any]) -> Callable[..., Any]:
    """Have the input's gradient computed, which nobody needs: so one graph serves all blocks.

    A graph for the lowest trained block alone would be half of all compiling.
    """

    def call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        counting = is_in_torch_dispatch_mode()  # operations, of what training itself needs
        if torch.is_grad_enabled() and not counting and not hidden_states.requires_grad:
            hidden_states = hidden_states.detach().requires_grad_()
        return block(hidden_states, *args, **kwargs)

    return call


def _no_symbols(net: PreTrainedModel) -> None:
    """Write settings that are floats, which become symbols, in another way where they are fixed.

    Where a symbol turns out to be fixed, torch analyses the block again, and keeps no graph: the
    probability 0.0 of dropout is the whole number 0, and SDPA's usual scale is its default.
    """
    for module in net.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and value == 0:
                setattr(module, name, 0)
        width, scale = getattr(module, "head_dim", None), getattr(module, "scaling", None)
        if net.config._attn_implementation == "sdpa" and width and scale == width**-0.5:
            vars(module)["scaling"] = None


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

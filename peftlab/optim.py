"""Optimizers beyond torch's own, and the learning-rate schedule that all share."""

import math
from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftlab.config import number
from peftlab.errors import InputError


class NetOptimizer(torch.optim.Optimizer):
    """An optimizer that has to know where in a model its tensors stand.

    in_backward: whether it updates each tensor as soon as backward has its gradient, which it
    then frees: the learning rate is to be set before, there is one backward pass per step, and
    `Method.after_step` finds no gradient.
    """

    in_backward = False

    def attach(self, net: PreTrainedModel) -> None:
        """Look at the model, once, before the first step. Raises: InputError if it does not fit."""
        raise NotImplementedError

    def gradient_norm(self) -> Tensor:
        """Global norm of the gradients of a step, if in_backward: they are gone after backward."""
        raise NotImplementedError


def in_backward(optimizer: torch.optim.Optimizer) -> TypeGuard[NetOptimizer]:
    """Whether the optimizer updates within backward."""
    return isinstance(optimizer, NetOptimizer) and optimizer.in_backward


def lora_plus(
    params: Sequence[nn.Parameter], *, lr: float, ratio: float, **adamw
) -> torch.optim.AdamW:
    """LoRA+: AdamW with lr · ratio for the factor that starts at 0, and for vectors.

    Hayou, Ghosh and Yu 2024, arXiv:2402.12354. The factor is known by its value before the first
    step, so that every method with one is served, whatever its tensors are called.
    Raises: InputError if no matrix, or every one, starts at 0.
    """
    number({"optimizer.ratio": ratio}, "optimizer.ratio", above=0)
    fast = [p for p in params if p.ndim == 1 or not p.detach().any()]
    slow = [p for p in params if not any(p is q for q in fast)]
    if not slow or not any(p.ndim > 1 for p in fast):
        raise InputError(
            "optimizer=loraplus: this method has no pair of a random factor and one that starts "
            "at 0; use optimizer=adamw"
        )
    groups = [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]
    return torch.optim.AdamW(groups, lr=lr, **adamw)


def schedule(name: str, *, warmup: float, steps: int) -> Callable[[int], float]:
    """Return the factor of the peak learning rate as a function of the step, 0 .. steps - 1.

    warmup: share of the steps over which the factor rises linearly; then cosine or linear to 0 at
    `steps`, or constant.
    """
    rising = round(warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        done = (step - rising) / max(1, steps - rising)
        match name:
            case "cosine":
                return (1 + math.cos(math.pi * done)) / 2
            case "linear":
                return 1 - done
            case _:
                return 1.0

    return factor

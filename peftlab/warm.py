"""The backbone, kept between the runs of one process: a sweep need not load it for each trial.

A method may leave the backbone changed: trained in place, cast, with a hook left behind. So a
backbone is handed on only if it is, to the bit, what was loaded; otherwise it is loaded again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftlab.backbone import Backbone, load_backbone
from peftlab.compiled import plain_blocks
from peftlab.method import Method

Fingerprint = list[tuple]
CHUNK = 4096  # bytes
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Loan(NamedTuple):
    """A backbone, and what it was when it was loaded."""

    backbone: Backbone
    key: str
    before: Fingerprint
    tensors: list[tuple[nn.Parameter, Tensor]]


class Shelf:
    """Holds at most one backbone that no run is using."""

    def __init__(self) -> None:
        self.spare: Loan | None = None
        self.loan: Loan | None = None  # the last one; an earlier one never comes back

    def load(self, model: Mapping, *, precision: str, block_length: int) -> Backbone:
        """Return the backbone from the shelf, or load it: see `load_backbone`."""
        key = json.dumps([dict(model), precision, block_length], sort_keys=True)
        if self.spare is None or self.spare.key != key:
            self.spare = None  # another model makes room before this one is loaded
            backbone = load_backbone(model, precision=precision, block_length=block_length)
            tensors = [(p, p.data) for p in backbone.net.parameters()]
            self.spare = Loan(backbone, key, fingerprint(backbone.net), tensors)
        self.loan, self.spare = self.spare, None
        return self.loan.backbone

    def give_back(self, backbone: Backbone) -> bool:
        """Take the method off and keep the backbone, if that leaves it as it was lent."""
        loan, self.loan = self.loan, None
        if loan is None or loan.backbone is not backbone:
            raise ValueError("this backbone is not lent")
        plain_blocks(backbone.net)
        method = getattr(backbone.net, "peft", None)
        if isinstance(method, Method):
            method.detach(backbone.net)
        for (
            p,
            data,
        ) in loan.tensors:  # a cast tensor was trained beside its original, which is whole
            p.data = data
        backbone.net.requires_grad_(False)
        backbone.net.zero_grad()
        backbone.net.eval()
        kept = fingerprint(backbone.net) == loan.before
        if kept:
            self.spare = loan
        return kept


def fingerprint(net: PreTrainedModel) -> Fingerprint:
    """Return what decides the function of `net`: modules, hooks, settings, and every tensor."""
    facts: Fingerprint = [(net.config.to_json_string(), net.config._attn_implementation)]
    for name, module in net.named_modules():
        hooks = [list(getattr(module, hooks)) for hooks in HOOKS]
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        replaced = "forward" in vars(module)
        facts.append((name, id(module), type(module), hooks, replaced, sorted(plain.items())))
        tensors: dict[str, Any] = {**module._parameters, **module._buffers}
        for key, tensor in tensors.items():
            facts.append((key, None if tensor is None else _checksum(tensor)))
    return facts


def _checksum(tensor: Tensor) -> tuple:
    """Return type, shape, place, and a hash over the 64-bit sums of each 4 KiB of the bytes."""
    words = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = len(words) // CHUNK * CHUNK
    sums = words[:whole].view(torch.int64).view(-1, CHUNK // 8).sum(1)
    digest = hashlib.sha256(sums.cpu().numpy().tobytes())
    digest.update(words[whole:].cpu().numpy().tobytes())
    facts = (tensor.dtype, tuple(tensor.shape), str(tensor.device), tensor.requires_grad)
    hooked = bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)
    return *facts, hooked, digest.digest()

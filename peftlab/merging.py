"""Does the merged model compute what the adapted one does? Measured on real tokens, in float32."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from peftlab.data import Batch
from peftlab.fit import logits_of
from peftlab.method import attached
from peftlab.nf4 import dequantize_, restore_

RELATIVE = 1e-4  # of the largest logit: float32 rounding through 30 layers stays well below


def merge_check(net: PreTrainedModel, batch: Batch) -> dict | None:
    """Merge the attached method and compare logits; leave the backbone frozen, bare, as it was.

    Only positions with a target are compared: what a model makes of padding is degenerate and
    amplifies rounding thirtyfold. Returns max_abs_logit_diff, tolerance (both in nats, as logits
    are) and ok; None if the method cannot be merged, or trains the backbone in place.
    """
    method = attached(net)
    net.eval()
    batch = batch.to(next(net.parameters()).device)
    if not method.mergeable or not any(True for _ in method.parameters()):
        method.detach(net)
        return None
    with torch.no_grad(), _as_float32(net):
        adapted = logits_of(net, batch)
        method.merge(net)
        difference = (logits_of(net, batch) - adapted).abs().max().item()
    tolerance = RELATIVE * max(1.0, adapted.abs().max().item())
    ok = math.isfinite(difference) and difference <= tolerance
    return {"max_abs_logit_diff": difference, "tolerance": tolerance, "ok": ok}


@contextmanager
def _as_float32(net: nn.Module) -> Iterator[None]:
    """Compute in float32 inside; afterwards the frozen weights are the very same bits again.

    Quantised weights are dense inside: a dequantised copy is what one merges into.
    """
    quantised = dequantize_(net)
    frozen = {name: (p, p.data) for name, p in net.named_parameters() if not p.requires_grad}
    try:
        for p, stored in frozen.values():
            p.data = stored.to(torch.float32, copy=True)
        yield
    finally:
        for p, stored in frozen.values():
            p.data = stored
        for layer, packed in quantised.items():
            restore_(layer, packed)

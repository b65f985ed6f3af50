"""What training changed in the weight matrices, whatever the method: W' - W, layer by layer.

W' is what merging writes: the one definition that every method with dense weights has. It is
computed in float64, so that a small change of large weights keeps its digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftlab.cards import card
from peftlab.config import method_name
from peftlab.errors import InputError, require
from peftlab.method import NotMergeable, attached
from peftlab.nf4 import dequantize_
from peftlab.parts import base_of
from peftlab.recorded import Record, restore
from peftlab.sites import find_sites, kinds_of


class Change(NamedTuple):
    """One linear layer before and after."""

    name: str  # "model.layers.3.self_attn.q_proj"
    kind: str  # its role: "q"
    W: Tensor  # [d_out, d_in], float64: frozen
    delta: Tensor  # [d_out, d_in], float64: W' - W


class Directions(NamedTuple):
    """The leading singular vectors of a matrix [d_out, d_in], the largest value first."""

    U: Tensor  # [d_out, k]: left, of the output
    s: Tensor  # [k]
    V: Tensor  # [d_in, k]: right, of the input


def changes(run: Record) -> Iterator[Change]:
    """Yield every linear layer of the model's kinds that the run changed, in order.

    Holds the model twice, once in float64. Raises: InputError for a run whose method has no dense
    weights, and for one that changed no matrix.
    """
    here = {**run.config, "model": {**run.config["model"], "device": "auto"}}
    frozen, after = base_of(here), restore(run)
    for backbone in (frozen, after):
        dequantize_(backbone.net)
    after.net.double()
    _merge(run, after.net)
    found = False
    for site in find_sites(frozen.net, kinds_of(frozen.net.config.model_type, frozen.kinds), "all"):
        W = site.module.weight.detach().double()
        delta = after.net.get_parameter(f"{site.name}.weight").detach() - W
        if delta.any():
            found = True
            yield Change(site.name, site.kind, W, delta)
    name = method_name(run.config["method"])
    require(found, "RUN", run.folder, f"a run that changed a weight matrix; {name} changed none")


def _merge(run: Record, net: nn.Module) -> None:
    """Merge, or say by the method's card why it has no W'."""
    try:
        attached(net).merge(net)
    except NotMergeable as error:
        why = card(method_name(run.config["method"])).merge.partition("no: ")[2]
        words = f"{error}: {why}" if why else str(error)
        raise InputError(f"RUN={run.folder}: has no change of weights; {words}") from error


def directions(matrix: Tensor, most: int | None = None) -> Directions:
    """Return the leading singular vectors, at most `most`, and none behind the numerical rank."""
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    k = min(rank(s, matrix), len(s) if most is None else most)
    return Directions(U[:, :k], s[:k], Vh[:k].T)


def rank(s: Tensor, matrix: Tensor) -> int:
    """Return the numerical rank: singular values s above the largest · max(sides) · epsilon."""
    least = s[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    return int((s > least).sum())


def drawn(d: int, k: int, generator: torch.Generator) -> Tensor:
    """Draw k orthonormal columns [d, k], float64, that span a uniformly random subspace."""
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q

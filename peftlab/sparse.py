"""Chosen entries of matrices: how they are trained, and how they are chosen.

A gradient mask would leave gradient and optimizer state as large as the matrices, and let weight
decay move what is masked. Here the chosen entries are one vector, the only thing that is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.bits import IGNORE
from peftlab.data import Example
from peftlab.errors import require
from peftlab.products import linear, outer

if TYPE_CHECKING:
    from peftlab.data import Batch


class Part:
    """The chosen entries of one matrix, of `shape` [d_out, d_in].

    All parts of one shape are filled up to the same length m, so that torch.compile makes one
    graph for all layers: with the value 0, at a place behind the matrix's last.
    """

    at: Tensor  # [m] int64: where they stand in the matrix, read by rows
    slots: Tensor  # [m] int64: where they stand among the values of all; behind the last: no value
    dealt: Tensor | None = None  # during a forward pass: their values, in its graph

    def __init__(self, owner: Entries, shape: tuple[int, int]) -> None:
        self.owner, self.shape = owner, shape

    @property
    def values(self) -> Tensor:
        """The entries, [m] float32."""
        return self.owner.values_at(self.slots) if self.dealt is None else self.dealt

    def added_to(self, matrix: Tensor) -> Tensor:
        """Return `matrix` plus this one; the other entries keep their bits."""
        flat = F.pad(matrix.flatten(), (0, 1)).index_add(0, self.at, self.values)
        return flat[:-1].view(self.shape)

    def linear(self, x: Tensor) -> Tensor:
        """Map x [..., d_in] to its product with the matrix, transposed: [..., d_out].

        Nothing of the matrix's size is kept for backward.
        """
        return cast(Tensor, _Linear.apply(x, self.values, self.at, self.shape))


class Entries(nn.Module):
    """k chosen entries of several matrices: one trained vector, and where its numbers stand.

    values [k] float32, trained, start at 0. index [k] int64, stored: positions in all matrices
    laid end to end, each by rows, ascending; spread evenly until others are chosen.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], k: int, device: torch.device) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(k, device=device))
        self.parts = [Part(self, shape) for shape in shapes]
        self.bounds = [0, *accumulate(d_out * d_in for d_out, d_in in shapes)]
        apart = self.bounds[-1] // k
        self.index = nn.Buffer(torch.arange(k, device=device) * apart)
        self._cut([min(math.ceil(bound / apart), k) for bound in self.bounds])

    def values_at(self, slots: Tensor) -> Tensor:
        """Return values[slots], 0 where a slot is k."""
        return F.pad(self.values, (0, 1)).index_select(0, slots)

    def hook(self, net: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Deal `values` out to the parts once per forward pass of `net`.

        Backward then joins their gradients once: k numbers, not k for each part.
        """

        def deal(*_: object) -> None:
            slots = [part.slots for part in self.parts]
            pieces = self.values_at(torch.cat(slots)).split([len(part) for part in slots])
            for part, piece in zip(self.parts, pieces, strict=True):
                part.dealt = piece

        def collect(*_: object) -> None:
            for part in self.parts:
                part.dealt = None

        yield net.register_forward_pre_hook(deal)
        yield net.register_forward_hook(collect, always_call=True)

    @torch.no_grad()
    def choose(self, index: Tensor) -> None:
        """Train these positions: k of them, ascending."""
        self.index.copy_(index)
        self.find()

    def find(self) -> None:
        """Find out what belongs to which matrix: whenever `index` has changed."""
        bounds = torch.tensor(self.bounds, device=self.index.device)
        self._cut(torch.searchsorted(self.index, bounds).tolist())

    def _cut(self, cuts: list[int]) -> None:
        """Give each part what stands in `index` from one cut to the next."""
        most: dict[tuple[int, int], int] = {}
        spans = list(pairwise(cuts))
        for part, (start, stop) in zip(self.parts, spans, strict=True):
            most[part.shape] = max(most.get(part.shape, 0), stop - start)
        every = torch.arange(len(self.index), device=self.index.device)
        for part, (start, stop), (first, end) in zip(
            self.parts, spans, pairwise(self.bounds), strict=True
        ):
            fill = (0, most[part.shape] - (stop - start))
            part.at = F.pad(self.index[start:stop] - first, fill, value=end - first)
            part.slots = F.pad(every[start:stop], fill, value=len(every))

    def _apply(self, fn: Callable, recurse: bool = True):
        """Cut anew what a move (`.to()`) replaced by another tensor."""
        super()._apply(fn, recurse)
        self.find()
        return self


class _Linear(torch.autograd.Function):
    """x times a sparse matrix, which is made dense for the product, and again in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, at: Tensor, shape: tuple[int, int]):
        ctx.save_for_backward(x, values, at)
        ctx.shape = shape
        return linear(x, _dense(values, at, shape).to(x.dtype))

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (gradient,) = grad_outputs
        x, values, at = ctx.saved_tensors
        of_x = of_values = None
        if ctx.needs_input_grad[0]:
            of_x = linear(gradient, _dense(values, at, ctx.shape).to(gradient.dtype).T)
        if ctx.needs_input_grad[1]:
            slope = outer(gradient, x).flatten()
            of_values = slope[at.clamp(max=len(slope) - 1)].to(
                values.dtype
            )  # a fill learns nothing
        return of_x, of_values, None, None


def _dense(values: Tensor, at: Tensor, shape: tuple[int, int]) -> Tensor:
    return values.new_zeros(shape[0] * shape[1] + 1).scatter(0, at, values)[:-1].view(shape)


def largest(scores: Iterable[Tensor], k: int) -> Tensor:
    """Return where the k largest of all scores, laid end to end, stand, ascending: exactly k.

    Goes through them one tensor after the other, and never holds more than 3 k beside it.
    """
    best, at = torch.empty(0), torch.empty(0, dtype=torch.int64)
    offset, floor = 0, -math.inf
    for score in scores:
        flat = score.flatten()
        (found,) = (flat > floor).nonzero(as_tuple=True)
        best = torch.cat([best.to(flat), flat[found]])
        at = torch.cat([at.to(flat.device), found + offset])
        offset += len(flat)
        if len(best) > 3 * k:
            best, kept = best.topk(k)
            at, floor = at[kept], best[-1].item()
    return at[best.topk(k).indices].sort().values


def share_of(total: int, keep: float, what: str) -> int:
    """Return ⌊keep total⌋. Raises: InputError unless method.keep is a share that leaves some."""
    number = isinstance(keep, int | float) and not isinstance(keep, bool)
    require(number and 0 < keep <= 1, "method.keep", keep, "a share in (0, 1]")
    require(int(keep * total) >= 1, "method.keep", keep, f"at least one of {total} {what}")
    return int(keep * total)


def drawn(batches: Iterable[Batch], n: int) -> list[Example]:
    """Draw n examples, or all if there are fewer, in random order, by torch's random state.

    What follows the last target of an example moves no loss and is cut off.
    """
    rows = [(batch, row) for batch in batches for row in range(len(batch.ids))]
    order = torch.randperm(len(rows), device="cpu")[:n]
    return [_example(*rows[at]) for at in order.tolist()]


def _example(batch: Batch, row: int) -> Example:
    scored = (batch.targets[row] != IGNORE).nonzero()
    end = int(scored.max()) + 1 if len(scored) else 1
    positions = None if batch.positions is None else batch.positions[row, :end]
    return Example(batch.ids[row, :end], batch.targets[row, :end], positions)

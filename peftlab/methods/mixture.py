"""What the two mixtures of AdaMix have in common: routing, consistency, the average of experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftlab.bits import IGNORE, nll
from peftlab.errors import require
from peftlab.method import SiteMethod, check_count

if TYPE_CHECKING:
    from peftlab.data import Batch


class Mixture(SiteMethod):
    """Several experts per site: in training one of them, drawn at random, else their average.

    A subclass declares the tensors of one expert, makes several of them by `multiply`, sets
    `consistency`, λ, and states its equation for the tensors `routed(t)` in place of t.
    """

    consistency: float
    pools: tuple[tuple[str, ...], ...] = ()  # names of tensors of which one expert has its own

    def multiply(self, *names: str, **experts: int) -> None:
        """Make equal copies of the tensors `names`, [...] to [M, ...]: M named as in the YAML."""
        check_count(**experts)
        (count,) = experts.values()
        for name in names:
            self._replace(name, lambda p: p.expand(count, *p.shape).clone())
        self.pools = (*self.pools, names)

    def routed(self, t: SimpleNamespace) -> SimpleNamespace:
        """Return a site's tensors with one expert of each pool: drawn anew, or the average."""
        chosen = {}
        for names in self.pools:
            pool = [getattr(t, name) for name in names]  # [M, ...] each
            if self.training:
                drawn = torch.randint(len(pool[0]), ())  # from the state that a checkpoint keeps
                experts = [p[drawn] for p in pool]
            else:
                experts = [p.mean(0) for p in pool]
            chosen |= dict(zip(names, experts, strict=True))
        return SimpleNamespace(**chosen)

    def objective(
        self,
        nats: Callable[[Batch], Tensor],
        logits: Callable[[Batch], Tensor],
        batch: Batch,
    ) -> tuple[Tensor, Tensor]:
        """Return nats of one routing + λ times its disagreement with a second; and those nats."""
        if self.consistency == 0:
            return super().objective(nats, logits, batch)
        first, second = logits(batch), logits(batch)
        targets = batch.targets[batch.targets != IGNORE].to(first.device)
        lost = nll(first, targets)
        return lost + self.consistency * disagreement(first, second), lost

    def compact(self) -> None:
        """Keep only the average of the experts, [1, ...]."""
        for name in (name for names in self.pools for name in names):
            self._replace(name, lambda p: p.mean(0, keepdim=True))

    def _replace(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        holder = getattr(self, name)
        for key, p in list(holder.named_parameters()):
            setattr(holder, key, nn.Parameter(change(p.detach())))
        self._link(name)


def disagreement(first: Tensor, second: Tensor) -> Tensor:
    """Sum over rows of (KL(p, q) + KL(q, p)) / 2 in nats, p and q the softmax of logits [N, V].

    The two divergences add up to Σ (p - q) (ln p - ln q), of which no term is negative.
    """
    ln_p, ln_q = first.log_softmax(-1), second.log_softmax(-1)
    return ((ln_p.exp() - ln_q.exp()) * (ln_p - ln_q)).sum() / 2


def check_consistency(value: float) -> float:
    """Return λ: a finite number from 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    allowed = "a finite number of at least 0"
    require(number and 0 <= value < math.inf, "method.consistency", value, allowed)
    return value

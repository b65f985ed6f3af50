"""FAR."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.data import Batch, pad
from peftlab.errors import require
from peftlab.method import (
    WeightMethod,
    check_count,
    check_positive,
    check_switch,
)
from peftlab.sites import MLP, Site
from peftlab.sparse import drawn, share_of


class FAR(WeightMethod):
    """FAR, Freeze And Reconfigure: Vucetic et al. 2022, arXiv:2205.01541, section 3.

        [W' b'] = [W b] + P delta          delta [n, d_in], or [n, d_in + 1] with a bias, per site

    Some output nodes of every linear layer of the MLP, the learners, are trained, the others are
    frozen: P [d_out, n] puts the n = ⌊keep d_out⌋ rows of delta at the learners' places `rows`.

    Priming chooses them: all of the MLP is trained for priming_steps steps of priming_batch
    training examples each (AdamW without decay, constant priming_lr), and learners are those
    nodes whose weights and bias have moved farthest, in the sum of absolute changes. Unless
    `reset`, they go on from there; all other nodes go back to what they were.

    Init: delta = what priming has changed, so at step 0 it is not the identity: it is primed; with
    reset=true delta = 0 and W' = W.
    Trainable:
        per site: int(keep * d_out) * (d_in + biased)
    Differs from the paper: nothing else of the backbone is trained. Nodes of gate, up and down are
    chosen for each layer alone. The two parts of a layer are not laid apart in memory. Priming is
    beside the epochs: its steps are not counted, nor is its memory (four float32 for each weight
    of the MLP).
    Merge: exact.
    Family: selective.
    """

    identity = False

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        keep: float,
        priming_steps: int,
        priming_batch: int,
        priming_lr: float,
        reset: bool,
    ) -> None:
        super().__init__(sites)
        for site in sites:
            allowed = f"mlp, or some of {', '.join(MLP)}: FAR belongs to the MLP"
            require(site.kind in MLP, "method.sites", site.kind, allowed)
        check_count(priming_steps=priming_steps, priming_batch=priming_batch)
        check_positive(priming_lr=priming_lr)
        check_switch(reset=reset)
        self.own("delta", lambda s: torch.zeros(_n_learners(s, keep), s.d_in + _biased(s)))
        self.fixed("rows", lambda s: torch.arange(_n_learners(s, keep)))
        self.priming_steps, self.priming_batch = priming_steps, priming_batch
        self.priming_lr = priming_lr
        self.reset = self.identity = reset

    def weight(self, t: SimpleNamespace, W: Tensor) -> Tensor:
        """W' = W + P delta, without the column of the bias."""
        return W.index_add(0, t.rows, t.delta[:, : W.shape[1]])

    def bias(self, t: SimpleNamespace, b: Tensor) -> Tensor:
        """B' = b + P times the last column of delta."""
        return b.index_add(0, t.rows, t.delta[:, -1])

    def forward(self, t: SimpleNamespace, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Y' = y + P delta [x 1]: only the learners' rows are multiplied."""
        return y.index_add(-1, t.rows, _affine(x, t.delta).to(y.dtype))

    def prepare(self, nats: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> None:
        """Prime, and choose the learners."""
        changes = self.prime(nats, batches)
        for t, change in zip(self.tensors, changes, strict=True):
            rows = change.abs().sum(1).topk(len(t.rows)).indices.sort().values
            t.rows.copy_(rows)
            if not self.reset:
                t.delta.data.copy_(change[rows])

    def prime(self, nats: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> list[Tensor]:
        """Train all of the sites; return the change of each, [d_out, d_in] or [d_out, d_in + 1]."""
        examples = []
        while len(examples) < self.priming_steps * self.priming_batch:
            examples += drawn(batches, self.priming_steps * self.priming_batch)
        with _changes(self.sites) as changes:
            optimizer = torch.optim.AdamW(changes, lr=self.priming_lr, weight_decay=0.0)
            for step in range(self.priming_steps):
                first = step * self.priming_batch
                batch = pad(examples[first : first + self.priming_batch])
                optimizer.zero_grad()
                (nats(batch) / batch.n_targets).backward()
                optimizer.step()
        self.zero_grad()
        return [change.detach() for change in changes]


@contextmanager
def _changes(sites: Sequence[Site]) -> Iterator[list[Tensor]]:
    """Inside, each site has a trained change of all of W and b, which starts at 0."""

    def add(change: Tensor, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        return y + _affine(args[0], change).to(y.dtype)

    changes, handles = [], []
    for site in sites:
        weight = site.module.weight
        shape = (site.d_out, site.d_in + _biased(site))
        changes.append(torch.zeros(shape, device=weight.device, requires_grad=True))
        handles.append(site.module.register_forward_hook(partial(add, changes[-1])))
    try:
        yield changes
    finally:
        for handle in handles:
            handle.remove()


def _affine(x: Tensor, rows: Tensor) -> Tensor:
    """Map x [..., d_in] by rows [n, d_in], or by [n, d_in + 1], whose last column is a bias."""
    d_in = x.shape[-1]
    return F.linear(x, rows[:, :d_in], rows[:, d_in] if rows.shape[1] > d_in else None)


def _n_learners(site: Site, keep: float) -> int:
    return share_of(site.d_out, keep, f"nodes ({site.name})")


def _biased(site: Site) -> bool:
    return site.module.bias is not None

"""FishMask."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftlab.bits import IGNORE
from peftlab.data import Batch, pad
from peftlab.errors import require
from peftlab.fit import logits_of
from peftlab.method import WeightMethod, check_count
from peftlab.products import outer
from peftlab.sites import Site
from peftlab.sparse import Entries, drawn, largest, share_of

SCORES = ("square", "absolute")
LABELS = ("data", "sampled")


class FishMask(WeightMethod):
    """FISH mask: Sung, Nair and Raffel 2021, arXiv:2111.09839, section 2.

        W' = W + S(values)          values [k] one for the model; S [d_out, d_in] per site

    S has each number of `values` at its place and is 0 elsewhere. The places are the
    k = ⌊keep n_weights⌋ entries of all sites together, n_weights in number, with the largest
    diagonal of the Fisher information at the start

        F = mean over examples of (∂ ln p(y | x) / ∂W)²

    over n_examples training examples, each alone, as the square of a sum over several is no
    Fisher information; ln p is the sum over an example's tokens. score=absolute takes |·| for
    (·)². labels=data takes y from the data ("empirical Fisher"); sampled draws one y per position
    from the model. Trained is the vector, not a masked W: the optimizer's state has k entries,
    and weight decay moves nothing else, but `values` to 0, that is W' to W.

    Init: values = 0, so W' = W at step 0.
    Trainable:
        per model: int(keep * n_weights)
    Differs from the paper: the entries are those of the sites, without biases, norms and
    embeddings. Before training, one float32 per weight is held for F.
    Merge: exact.
    Family: selective.
    """

    def __init__(
        self, sites: Sequence[Site], *, keep: float, n_examples: int, score: str, labels: str
    ) -> None:
        super().__init__(sites)
        check_count(n_examples=n_examples)
        require(score in SCORES, "method.score", score, " or ".join(SCORES))
        require(labels in LABELS, "method.labels", labels, " or ".join(LABELS))
        shapes = [(site.d_out, site.d_in) for site in sites]
        k = share_of(sum(d_out * d_in for d_out, d_in in shapes), keep, "weights")
        self.chosen = Entries(shapes, k, sites[0].module.weight.device)
        for t, part in zip(self.tensors, self.chosen.parts, strict=True):
            t.S = part
        self.k, self.n_examples, self.score, self.labels = k, n_examples, score, labels

    def weight(self, t: SimpleNamespace, W: Tensor) -> Tensor:
        """W' = W + S."""
        return t.S.added_to(W)

    def forward(self, t: SimpleNamespace, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Y' = y + S x: in bf16 the small change keeps its digits, and no W' is kept."""
        return y + t.S.linear(x.to(y.dtype))

    def hook(self, backbone: nn.Module) -> None:
        """Act on every site, with `values` dealt out at the start of a forward pass."""
        net = cast(PreTrainedModel, backbone)
        self.logits = partial(logits_of, net)
        self.handles += self.chosen.hook(net.base_model)
        super().hook(backbone)

    def loaded(self) -> None:
        """Find out which entries the file names."""
        self.chosen.find()

    def prepare(self, nats: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> None:
        """Choose the entries."""
        self.chosen.choose(largest(self.fisher(nats, batches), self.k))

    def fisher(self, nats: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> list[Tensor]:
        """Return F [d_out, d_in] of every site, float32."""
        totals = [torch.zeros(s.d_out, s.d_in, device=s.module.weight.device) for s in self.sites]

        def add(site: int, gradient: Tensor) -> None:
            g = gradient.float()
            totals[site].add_(g.abs() if self.score == "absolute" else g.square())

        examples = drawn(batches, self.n_examples)
        for example in examples:
            batch = pad([example])
            if self.labels == "sampled":
                batch = self._sampled(batch)
            with _weight_gradients(self.sites, add):
                nats(batch).backward()
        self.zero_grad()
        return [total.div_(len(examples)) for total in totals]

    @torch.no_grad()
    def _sampled(self, batch: Batch) -> Batch:
        batch = batch.to(self.chosen.index.device)
        targets = batch.targets.clone()
        chances = self.logits(batch).softmax(-1)
        targets[targets != IGNORE] = torch.multinomial(chances, 1).squeeze(1)
        return batch._replace(targets=targets)


@contextmanager
def _weight_gradients(sites: Sequence[Site], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside, every backward pass shows see(i, the gradient of the frozen W of site i).

    One at a time: all of them are never there at once.
    """

    def watch(i: int, module: nn.Module, args: tuple, y: Tensor) -> None:
        x = args[0].detach().to(y.dtype)
        y.register_hook(lambda gradient: see(i, outer(gradient, x)))

    handles = [site.module.register_forward_hook(partial(watch, i)) for i, site in enumerate(sites)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""SparseAdapter."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftlab.data import Batch, pad
from peftlab.errors import require
from peftlab.method import check_count, check_positive
from peftlab.methods.bottleneck import Bottleneck, cut_normal
from peftlab.sites import Site
from peftlab.sparse import drawn, largest, share_of

SCORES = ("random", "magnitude", "snip")
AT_ONCE = 8  # examples per pass for SNIP, whose score is of a sum over all of them


class SparseAdapter(Bottleneck):
    """SparseAdapter: He et al. 2022, arXiv:2210.04284, section 3.

        y' = y + U φ(D y + b_D) + b_U          y [..., d_out] a sublayer's output, φ the activation
        D [bottleneck, d_out], U [d_out, bottleneck] per site, sparse; b_D [bottleneck], b_U [d_out]

    Houlsby's adapter with ⌊keep n⌋ of the n = 2 bottleneck n_outputs weights in all D and U, where
    n_outputs is the sum of all d_out. They are chosen once, before training; the others are 0, and
    neither stored nor trained. Biases are dense. keep = 1 / c and a bottleneck c times as wide is
    the paper's Large-Sparse, of the size of a dense adapter.

    Chosen are the largest scores at a draw of D and U, both N(0, std²) cut at two std: random,
    magnitude |w|, or snip |w ∂w|, w's share in the loss of n_examples training examples. Scores
    at the real start would be void: with U = 0 all gradients of D are 0, so that every score of
    SNIP is, and magnitude prunes just U.

    Init: D as drawn, U = b_D = b_U = 0, so y' = y at step 0.
    Trainable:
        per model: int(keep * (2 * bottleneck * n_outputs))
        per site: bottleneck + d_out
    Differs from the paper: U starts at 0 once the choice is made. `keep` is what is kept; the
    paper's sparsity is 1 - keep. GraSP, SynFlow and the adapter's own layer norm are left out.
    Merge: no: its non-linearity is in no weight.
    Family: additive.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        bottleneck: int,
        keep: float,
        score: str,
        n_examples: int,
        activation: str,
        std: float,
    ) -> None:
        check_positive(std=std)
        check_count(n_examples=n_examples)
        require(score in SCORES, "method.score", score, f"one of {', '.join(SCORES)}")
        super().__init__(
            sites,
            kinds=("o", "down"),
            bottleneck=bottleneck,
            activation=activation,
            down=torch.empty,
        )
        self.discard("D", "U")  # dense; here each forward pass makes them of `values`
        self.shapes = [
            shape for s in sites for shape in ((bottleneck, s.d_out), (s.d_out, bottleneck))
        ]
        self.n = sum(d_out * d_in for d_out, d_in in self.shapes)
        self.k = share_of(self.n, keep, "weights of all adapters")
        device = sites[0].module.weight.device
        self.values = nn.Parameter(torch.zeros(self.k, device=device))
        self.index = nn.Buffer(torch.arange(self.k, device=device))  # in all D and U, end to end
        self.whole: Tensor | None = None  # all D and U, dense, while SNIP looks at them
        self.n_examples, self.score, self.std = n_examples, score, std

    def forward(self, t: SimpleNamespace, site: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Y' = y + U φ(D y + b_D) + b_U."""
        return y + self.adapter(t, y)

    def hook(self, backbone: nn.Module) -> None:
        """Act on every site, with D and U made of `values` once per forward pass."""
        net = cast(PreTrainedModel, backbone).base_model
        self.handles.append(net.register_forward_pre_hook(self._lay_out))
        super().hook(backbone)
        self.handles.append(net.register_forward_hook(self._clear, always_call=True))

    def _lay_out(self, *_: object) -> None:
        whole = self.whole
        if whole is None:
            whole = self.values.new_zeros(self.n).scatter(0, self.index, self.values)
        matrices = self._matrices(whole)
        for t, D, U in zip(self.tensors, matrices[0::2], matrices[1::2], strict=True):
            t.D, t.U = D, U

    def _clear(self, *_: object) -> None:
        for t in self.tensors:
            t.D = t.U = None

    def _matrices(self, whole: Tensor) -> list[Tensor]:
        """Cut a vector [n] into D and U of the first site, of the second, and so on."""
        pieces = whole.split([d_out * d_in for d_out, d_in in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def prepare(self, nats: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> None:
        """Draw D and U, and choose their weights."""
        start = torch.cat([cut_normal(*shape, std=self.std).flatten() for shape in self.shapes])
        start = start.to(self.index.device)
        index = largest([self.scores(start, nats, batches)], self.k)
        for U in self._matrices(start)[1::2]:
            U.zero_()
        with torch.no_grad():
            self.index.copy_(index)
            self.values.copy_(start[index])

    def scores(
        self, start: Tensor, nats: Callable[[Batch], Tensor], batches: Sequence[Batch]
    ) -> Tensor:
        """Return the scores [n] of the weights `start` [n] of all D and U, laid end to end."""
        if self.score == "random":
            return torch.rand_like(start)
        if self.score == "magnitude":
            return start.abs()
        self.whole = start.clone().requires_grad_()
        examples = drawn(batches, self.n_examples)
        for first in range(0, len(examples), AT_ONCE):
            nats(pad(examples[first : first + AT_ONCE])).backward()
        gradient, self.whole = cast(Tensor, self.whole.grad), None
        self.zero_grad()
        return (start * gradient).abs()

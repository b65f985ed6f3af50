"""The MAM adapter."""

from collections.abc import Sequence

from peftlab.errors import require
from peftlab.methods.parallel_adapter import ParallelAdapter
from peftlab.methods.prefix_tuning import PrefixTuning
from peftlab.sites import Site
from peftlab.stack import Stack


class MAM(Stack):
    """MAM adapter: He et al. 2021, arXiv:2110.04366, section 4.6.

        y' = softmax(q [K; k]ᵀ / √h) [V; v]      in the attention: K, V [length, d_kv] per layer,
                                                 made by an MLP of the width `hidden`
        y' = y + scale (U φ(D x + b_D) + b_U)    beside the MLP: D [bottleneck, d_out], U [d_out,
                                                 bottleneck] per layer

    Mix and match: a short prefix, as little changes in the attention are enough, and a wide adapter
    for the MLP, where more can be learned. The two are the methods of these names.

    Init: that of the two: the adapter starts at 0, the prefix is not the identity at step 0, as its
    keys take their share of the softmax.
    Trainable:
        per group: length * d_out + hidden * (d_out + 1) if kind == "o" and hidden else 0
        per site: 2 * d_kv * (hidden + 1 if hidden else length) if kind == "o" else 0
        per site: 2 * bottleneck * d_out + bottleneck + d_out if kind == "down" else 0
    Differs from the paper: as the two do. Its training recipe, with clipping and label smoothing,
    is left to the optimizer.
    Merge: no: the prefix adds positions, and the adapter's non-linearity is in no weight.
    Family: hybrid.
    """

    identity = False

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        length: int,
        hidden: int | None,
        std: float,
        bottleneck: int,
        activation: str,
        scale: float,
    ) -> None:
        of = {kind: [s for s in sites if s.kind == kind] for kind in ("o", "down")}
        prefix = PrefixTuning(of["o"], length=length, hidden=hidden, std=std)
        adapter = ParallelAdapter(
            of["down"], bottleneck=bottleneck, activation=activation, scale=scale
        )
        super().__init__(sites, [prefix, adapter])
        given = {s.kind for s in sites}
        allowed = "o and down: the prefix needs the one, the adapter the other"
        require(given == set(of), "method.sites", ", ".join(sorted(given)), allowed)

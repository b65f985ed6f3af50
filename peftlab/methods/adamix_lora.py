"""AdaMix over LoRA."""

from collections.abc import Sequence
from types import SimpleNamespace

from torch import Tensor, nn

from peftlab.methods.lora import LoRA
from peftlab.methods.mixture import Mixture, check_consistency
from peftlab.sites import Site


class AdaMixLoRA(Mixture, LoRA):
    """AdaMix over LoRA: Wang et al. 2022, arXiv:2205.12410, section 3.

        W' = W + (alpha / rank) B_j A_i          A_i [rank, d_in], B_j [d_out, rank] per site
        i in 1..experts_down, j in 1..experts_up, drawn per site and forward pass of a whole batch
        objective = nats(p) + consistency (KL(p, q) + KL(q, p)) / 2 per target, p and q the
        predictions of two forward passes, each with draws of its own

    Evaluated, saved and merged is one LoRA: the average of the A_i and that of the B_j, which is
    not the average of the products. A step takes two passes, and consistency: 0 only one.

    Init: all A_i are the same Kaiming uniform, U(-1/√d_in, 1/√d_in), and the draws make them
    differ; B = 0, so W' = W at step 0.
    Trainable:
        per site: rank * (experts_down * d_in + experts_up * d_out)
    Differs from the paper: A step moves the experts that it did not draw too, by Adam's momentum.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        rank: int,
        alpha: float,
        dropout: float,
        experts_down: int,
        experts_up: int,
        consistency: float,
    ) -> None:
        super().__init__(sites, rank=rank, alpha=alpha, dropout=dropout)
        self.consistency = check_consistency(consistency)
        self.multiply("A", experts_down=experts_down)
        self.multiply("B", experts_up=experts_up)

    def factors(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Return LoRA's factors, of the experts that are drawn, or of their average."""
        return super().factors(self.routed(t))

    def merge(self, backbone: nn.Module) -> None:
        """Merge the average of the experts, whatever the mode."""
        self.compact()
        super().merge(backbone)

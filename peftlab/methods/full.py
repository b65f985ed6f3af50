"""Full fine-tuning."""

from torch import nn

from peftlab.selected import SelectMethod


class Full(SelectMethod):
    """Full fine-tuning: no paper, the common baseline.

        W' = W + ΔW          ΔW [d_out, d_in] unrestricted

    Every weight of the backbone is trained.

    Init: the backbone's own weights, so W' = W at step 0.
    Trainable:
        per model: n_params
    Differs from the paper: nothing. Tied embeddings are one tensor and counted once.
    Merge: in place.
    Family: selective.
    """

    def selects(self, name: str, p: nn.Parameter) -> bool:
        """Everything."""
        return True

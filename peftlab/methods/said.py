"""SAID."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from peftlab.methods.did import DID
from peftlab.sites import Site


class SAID(DID):
    """SAID: Aghajanyan, Zettlemoyer and Gupta 2020, arXiv:2012.13255, eq. 3.

        W' = W + λ P z          λ [] per site; z [dimension] one for the model, P as in DID

    DID, aware of structure: each site has its own share λ of the common change. λ learns nothing
    in the very first step, as z is still 0.

    Init: z = 0, λ = 1, so W' = W at step 0.
    Trainable:
        per model: dimension
        per site: 1
    Differs from the paper: `dimension` is that of z, without the λ; linear layers only, with a λ
    for each. Differs from the authors' code: the gradient of H is exact, not divided by √n.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(self, sites: Sequence[Site], *, dimension: int) -> None:
        super().__init__(sites, dimension=dimension)
        self.own("lambda_", lambda s: torch.ones(()))

    def weight(self, t: SimpleNamespace, W: Tensor) -> Tensor:
        """W' = W + λ P z."""
        return W + t.lambda_ * self.change(t, W)

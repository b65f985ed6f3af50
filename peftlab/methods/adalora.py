"""AdaLoRA."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from peftlab.errors import require
from peftlab.method import LowRank, check_count, check_positive, check_rank, normal
from peftlab.sites import Site


class AdaLoRA(LowRank):
    """AdaLoRA: Zhang et al. 2023, arXiv:2303.10512, eq. 3.

        W' = W + (alpha / rank) P diag(Λ) Q      P [d_out, rank], Λ [rank], Q [rank, d_in] per site

    A common budget of triplets (a column of P, its Λ, a row of Q) shrinks, from rank to
    target_rank per site on average, and the sites compete for it. After step t of T

        b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))³     b_0 = n rank

    with b_T = n target_rank for n sites, t_i = warmup T, t_f = cooldown T: every `every` steps in
    between, Λ is set to 0 but for the b(t) triplets of the largest scores; at T - t_f the last
    choice is made, and stands. The score of a triplet is s(Λ_k) + mean s(P_k) + mean s(Q_k), with
    s = Ī Ū of each entry w, Ī the running mean of I = |w ∂w| (beta_1), Ū that of |I - Ī| (beta_2).
    The loss has orthogonality · mean ‖PᵀP - 1‖, ‖QQᵀ - 1‖ (Frobenius, over all P and Q) added.

    Init: P, Q N(0, 0.02²), Λ = 0, so W' = W at step 0.
    Trainable:
        per site: rank * (d_in + d_out + 1)
    Differs from the paper: the norms of the penalty are a mean and not squared, as in Hugging
    Face's peft. Triplets that were dropped keep their place in the file, with Λ = 0.
    Merge: exact.
    Family: reparametrisation.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        rank: int,
        target_rank: int,
        alpha: float,
        dropout: float,
        warmup: float,
        cooldown: float,
        every: int,
        beta_1: float,
        beta_2: float,
        orthogonality: float,
    ) -> None:
        super().__init__(sites, dropout=dropout)
        check_rank(sites, rank=rank)
        check_count(most=rank, target_rank=target_rank)
        check_count(every=every)
        check_positive(alpha=alpha)
        _check_share(1, "1", warmup=warmup)
        _check_share(1 - warmup, "1 - warmup", cooldown=cooldown)
        for name, beta in (("beta_1", beta_1), ("beta_2", beta_2)):
            allowed = "a number between 0 and 1, neither of them"  # at 0 or 1 all scores are 0
            require(_is_number(beta) and 0 < beta < 1, f"method.{name}", beta, allowed)
        finite = _is_number(orthogonality) and 0 <= orthogonality < math.inf
        allowed = "a finite number of at least 0"
        require(finite, "method.orthogonality", orthogonality, allowed)
        self.own("P", lambda s: normal(s.d_out, rank, std=0.02))
        self.own("Lambda", lambda s: torch.zeros(rank))
        self.own("Q", lambda s: normal(rank, s.d_in, std=0.02))
        # Stored until the end, so that a run that was stopped goes on exactly.
        for kind in ("mean", "spread"):
            self.fixed(f"P_{kind}", lambda s: torch.zeros(s.d_out, rank))
            self.fixed(f"Lambda_{kind}", lambda s: torch.zeros(rank))
            self.fixed(f"Q_{kind}", lambda s: torch.zeros(rank, s.d_in))
        self.fixed("kept", lambda s: torch.ones(rank))
        self.rank, self.target_rank, self.every = rank, target_rank, every
        self.warmup, self.cooldown = warmup, cooldown
        self.beta_1, self.beta_2 = beta_1, beta_2
        self.orthogonality = orthogonality
        self.scale = alpha / rank

    def factors(self, t: SimpleNamespace) -> tuple[Tensor, Tensor]:
        """Down = diag(Λ) Q, up = (alpha / rank) P."""
        return t.Lambda[:, None] * t.Q, self.scale * t.P

    def penalty(self) -> Tensor | None:
        """Return orthogonality times the mean distance of all PᵀP and QQᵀ from the identity."""
        if self.orthogonality == 0:
            return None
        grams = [gram for t in self.tensors for gram in (t.P.T @ t.P, t.Q @ t.Q.T)]
        one = torch.eye(self.rank, device=grams[0].device)
        distances = torch.stack([torch.linalg.matrix_norm(gram - one) for gram in grams])
        return self.orthogonality * distances.mean()

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Update the scores, and set to 0 every Λ that the budget of this step has no room for."""
        first, last = self._span(total)
        if step < last:
            self._observe()
        if step == last or (first < step < last and step % self.every == 0):
            self._choose(self.budget(step, total))
        elif step < last:
            return
        for t in self.tensors:
            t.Lambda.mul_(t.kept)

    def compact(self) -> None:
        """Drop the running means and the last choice: Λ holds what was chosen."""
        self.discard(
            "kept", *(f"{n}_{e}" for n in ("P", "Lambda", "Q") for e in ("mean", "spread"))
        )

    def budget(self, step: int, total: int) -> int:
        """b(t): how many triplets of all sites may be non-zero after step `step` of `total`."""
        first, last = self._span(total)
        most, least = (r * len(self.sites) for r in (self.rank, self.target_rank))
        left = 1 - min(max(step - first, 0) / (last - first), 1)
        return int((most - least) * left**3 + least)

    def _span(self, total: int) -> tuple[int, int]:
        """Return t_i and T - t_f: the budget shrinks in between; they always differ."""
        return int(self.warmup * total), total - int(self.cooldown * total)

    def _observe(self) -> None:
        for t in self.tensors:
            for name in ("P", "Lambda", "Q"):
                p, mean, spread = (getattr(t, name + end) for end in ("", "_mean", "_spread"))
                importance = (p * p.grad).abs()
                mean.lerp_(importance, 1 - self.beta_1)
                spread.lerp_((importance - mean).abs(), 1 - self.beta_2)

    def _choose(self, budget: int) -> None:
        scores = torch.cat([_score(t) for t in self.tensors])
        kept = torch.zeros_like(scores)
        kept[scores.topk(budget).indices] = 1
        for t, part in zip(self.tensors, kept.split(self.rank), strict=True):
            t.kept.copy_(part)


def _score(t: SimpleNamespace) -> Tensor:
    """Score of each triplet of one site, [rank]."""
    P, Q = t.P_mean * t.P_spread, t.Q_mean * t.Q_spread
    return t.Lambda_mean * t.Lambda_spread + P.mean(0) + Q.mean(1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_share(below: float, bound: str, **shares: float) -> None:
    for name, share in shares.items():
        allowed = f"a share of all steps, in [0, {bound})"
        require(_is_number(share) and 0 <= share < below, f"method.{name}", share, allowed)

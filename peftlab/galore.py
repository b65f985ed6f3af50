"""GaLore: full-rank training whose optimizer state has the size of a low-rank adapter's."""

# ruff: noqa: N803, N806 (matrices keep the paper's letters)

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from peftlab.config import at_least, number, one_of
from peftlab.errors import InputError, require
from peftlab.optim import NetOptimizer

SIDES = ("std", "reverse_std", "left", "right", "full")
CORES = ("adam", "sgd")


def projectors(G: Tensor, *, rank: int, side: str) -> dict[str, Tensor]:
    """Return P [m, r], Q [n, r] or both: leading singular vectors of the gradient G [m, n].

    side: std = the shorter one, reverse_std = the longer one (a square G counts as m < n), left =
    P, right = Q, full = both. Columns are orthonormal, in G's dtype, and each one's largest entry
    is positive: the moments outlive a projector, so its signs must not be the library's whim.
    """
    short, long = ("P", "Q") if G.shape[0] <= G.shape[1] else ("Q", "P")
    keep = {"std": short, "reverse_std": long, "left": "P", "right": "Q", "full": "PQ"}[side]
    exact = G.to(torch.promote_types(G.dtype, torch.float32))  # SVD knows no bf16
    U, _, Vh = torch.linalg.svd(exact, full_matrices=False)
    found = {"P": U[:, :rank], "Q": Vh[:rank].mT}
    return {name: _upright(found[name]).to(G.dtype) for name in keep}


def _upright(V: Tensor) -> Tensor:
    """Turn the columns of V [m, r] so that the largest entry of each is positive."""
    signs = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
    return (V * signs).contiguous()  # as a checkpoint would store it: strides change roundings


def project(G: Tensor, P: Tensor | None, Q: Tensor | None) -> Tensor:
    """Map G [m, n] to R = P' G [r, n], G Q [m, r] or P' G Q [r, r], whichever projectors exist."""
    R = G if P is None else P.mT @ G
    return R if Q is None else R @ Q


def lift(N: Tensor, P: Tensor | None, Q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return up [m, r] and down [r, n] with up down = P N, N Q' or P N Q'."""
    down = N if Q is None else Q.mT
    if P is None:
        return N, down
    return (P if Q is None else P @ N), down


def descend(p: Tensor, G: Tensor, state: dict[str, Tensor], group: dict, decay: float) -> None:
    """Move p by one step of the core on its gradient G, in place: AdamW or SGD, as in torch.

    state: step, float32, counted up here; the moments of AdamW, made at the first step.
    decay: decoupled weight decay, per step times lr.
    """
    if group["core"] == "sgd":
        state["step"] += 1
        p.mul_(1 - group["lr"] * decay).add_(G, alpha=-group["lr"])
        return
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    beta1, beta2 = group["betas"]
    adamw(
        [p],
        [G],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        fused=group["fused"],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=decay,
        eps=group["eps"],
        maximize=False,
    )


class GaLore(NetOptimizer):
    """GaLore: Zhao et al. 2024, arXiv:2403.03507, algorithm 2.

        R = P' G,  N = Adam(R),  W <- W - lr (scale P N + weight_decay W)     G [m, n], m <= n
        R = G Q,   N = Adam(R),  W <- W - lr (scale N Q' + weight_decay W)    m > n

    P [m, r] or Q [n, r]: leading singular vectors of G, found anew every `update_gap` steps from
    the gradient of that step. W: the weight of every trained nn.Linear but the output embedding.
    All other tensors get the core itself: AdamW, bit for bit torch's, or SGD.

    State: m r + 2 n r numbers per matrix of m <= n (core sgd: m r), in its dtype, on its device.
    Differs from the paper: nothing for side=std, core=adam but that signs of P and Q are fixed.
    As there, the moments are neither rotated nor reset when P changes.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        rank: int,
        update_gap: int,
        scale: float,
        side: str,
        core: str,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        per_layer: bool,
    ) -> None:
        """Take all tensors that are trained; `attach` tells which of them are projected.

        per_layer: update each tensor within backward and free its gradient at once.
        Raises: InputError for a setting out of range.
        """
        settings = {
            "lr": lr,
            "rank": rank,
            "update_gap": update_gap,
            "scale": scale,
            "side": side,
            "core": core,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        _check({f"optimizer.{key}": v for key, v in (settings | {"per_layer": per_layer}).items()})
        # `fused` is also what tells load_state_dict to leave `step` float32, on p's device
        super().__init__(params, settings | {"fused": True})
        self.in_backward = per_layer
        self.matrices: set[Tensor] = set()
        self.norms: dict[nn.Parameter, Tensor] = {}  # of gradients that backward has used up
        if per_layer:
            for index, group in enumerate(self.param_groups):
                for p in group["params"]:
                    p.register_post_accumulate_grad_hook(partial(self._within_backward, index))

    def attach(self, net: PreTrainedModel) -> None:
        """Project the weights of net's linear layers from now on.

        Raises: InputError if none is trained, or if one has a side shorter than the rank.
        """
        rank_of = {p: group["rank"] for group in self.param_groups for p in group["params"]}
        head = net.get_output_embeddings()
        for name, module in net.named_modules():
            if isinstance(module, nn.Linear) and module is not head and module.weight in rank_of:
                rank, most = rank_of[module.weight], min(module.weight.shape)
                allowed = f"a whole number from 1 to {most} (the shorter side of {name})"
                require(rank <= most, "optimizer.rank", rank, allowed)
                self.matrices.add(module.weight)
        if not self.matrices:
            raise InputError(
                "optimizer=galore: this method trains no weight of a linear layer; "
                "use method=full or method=top_layers, or optimizer=adamw"
            )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every tensor that has a gradient; those that backward has updated have none."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        self.norms.clear()
        return loss

    def gradient_norm(self) -> Tensor:
        """Global norm of the gradients that backward has used up since the last step."""
        order = [p for group in self.param_groups for p in group["params"] if p in self.norms]
        return nn.utils.get_total_norm([self.norms[p] for p in order])

    def _update(self, p: nn.Parameter, G: Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0, device=p.device)
        if p not in self.matrices:
            descend(p, G, state, group, decay=group["weight_decay"])
            return
        if int(state["step"]) % group["update_gap"] == 0:
            state.update(projectors(G, rank=group["rank"], side=group["side"]))
        P, Q = state.get("P"), state.get("Q")
        R = project(G, P, Q)
        N = torch.zeros_like(R)  # moved from 0 by the core, it becomes the step: -lr N
        descend(N, R, state, group, decay=0.0)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addmm_(*lift(N, P, Q), alpha=group["scale"])

    def _within_backward(self, index: int, p: nn.Parameter) -> None:
        G = cast(Tensor, p.grad)
        if p in self.norms:
            raise RuntimeError("optimizer.per_layer=true: one backward pass per step")
        # FLOPs of a step are those of forward and backward, not the optimizer's
        with torch.no_grad(), _disable_current_modes():
            self.norms[p] = nn.utils.get_total_norm([G])
            if self.norms[p].isfinite():  # else the run ends, and says why; SVD would only crash
                # looked up now: load_state_dict makes new groups
                self._update(p, G, self.param_groups[index])
        p.grad = None


def _check(settings: dict) -> None:
    at_least(settings, "optimizer.rank", 1)
    at_least(settings, "optimizer.update_gap", 1)
    number(settings, "optimizer.scale", above=0)
    one_of(settings, "optimizer.side", SIDES)
    one_of(settings, "optimizer.core", CORES)
    betas = settings["optimizer.betas"]
    require(len(betas) == 2, "optimizer.betas", betas, "two numbers in [0, 1)")
    for beta in betas:
        number({"optimizer.betas": beta}, "optimizer.betas", least=0, below=1)
    number(settings, "optimizer.eps", least=0)
    number(settings, "optimizer.weight_decay", least=0)
    one_of(settings, "optimizer.per_layer", (True, False))

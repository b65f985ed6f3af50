"""GaLore by hand, against numpy and torch's own optimizers; its updates within backward; runs."""

import json
import signal
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make, tiny_gpt2, tiny_llama
from test_run import adapter_of, go, rows_of
from torch import nn

from peftlab.errors import InputError
from peftlab.galore import SIDES, GaLore, projectors
from peftlab.parts import assemble
from peftlab.run import Halted

SETTINGS: dict[str, Any] = {
    "lr": 0.1,
    "rank": 1,
    "update_gap": 200,
    "scale": 1.0,
    "side": "std",
    "core": "adam",
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "per_layer": False,
}


def galore(params, **changes) -> GaLore:
    return GaLore(params, **(SETTINGS | changes))


class OneLayer(nn.Module):
    """What `attach` needs of a model, around one weight."""

    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Linear(*reversed(weight.shape), bias=False)
        self.layer.weight = nn.Parameter(weight.clone())

    def get_output_embeddings(self):
        return None


def one_layer(weight, **changes) -> tuple[nn.Parameter, GaLore]:
    net: Any = OneLayer(weight)
    optimizer = galore(net.parameters(), **changes)
    optimizer.attach(net)
    return net.layer.weight, optimizer


def move(p, optimizer, G):
    """Step on gradient G; return how far p moved."""
    before = p.detach().clone()
    p.grad = G.clone()
    optimizer.step()
    return p.detach() - before


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# Singular values 5 and 1; u_1 = (1, 0), v_1 = (0.6, 0.8, 0).
G23 = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        # Adam with eps 1 begins with R / (|R| + 1)
        ("std", [3 / 4, 4 / 5, 0]),  # R = P' G = (3, 4, 0)
        ("left", [3 / 4, 4 / 5, 0]),
        ("reverse_std", [5 / 6 * 0.6, 5 / 6 * 0.8, 0]),  # R = G Q = (5, 0)
        ("right", [5 / 6 * 0.6, 5 / 6 * 0.8, 0]),
        ("full", [5 / 6 * 0.6, 5 / 6 * 0.8, 0]),  # R = P' G Q = 5
    ],
)
def test_first_step_by_hand(side, expected):
    p, optimizer = one_layer(torch.zeros(2, 3).double(), side=side, eps=1.0, scale=0.25)
    hand = -0.1 * 0.25 * torch.tensor([expected, [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(move(p, optimizer, G23), hand, atol=1e-15, rtol=0)
    # Of the transposed gradient std is the other side, left and right change places.
    other = {"left": "right", "right": "left"}.get(side, side)
    p, optimizer = one_layer(torch.zeros(3, 2).double(), side=other, eps=1.0, scale=0.25)
    torch.testing.assert_close(move(p, optimizer, G23.mT), hand.mT, atol=1e-15, rtol=0)


def singular(G, rank):
    """Leading singular vectors by numpy, the largest entry of each positive."""
    U, _, Vh = np.linalg.svd(G, full_matrices=False)
    leading = (U[:, :rank], Vh[:rank].T)
    return [V * np.sign(V[np.abs(V).argmax(0), range(rank)]) for V in leading]


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
@pytest.mark.parametrize("side", SIDES)
def test_eight_steps_equal_numpy(shape, side):
    """The paper's algorithm 2, with a new subspace at steps 0, 3 and 6, and weight decay."""
    lr, scale, decay, eps, rank = 0.1, 0.5, 0.3, 1e-3, 2
    W = random(*shape, seed=9).numpy()
    changes = {"rank": rank, "scale": scale, "weight_decay": decay, "eps": eps, "update_gap": 3}
    p, optimizer = one_layer(torch.tensor(W), side=side, **changes)
    left = side in ("left", "full") or side == ("std" if shape[0] <= shape[1] else "reverse_std")
    right = side in ("right", "full") or not left
    M = V = 0
    for k in range(8):
        G = random(*shape, seed=k).numpy()
        P, Q = singular(random(*shape, seed=k - k % 3).numpy(), rank)
        P, Q = P if left else np.eye(shape[0]), Q if right else np.eye(shape[1])
        R = P.T @ G @ Q
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
        N = (M / (1 - 0.9 ** (k + 1))) / (np.sqrt(V / (1 - 0.999 ** (k + 1))) + eps)
        W = W - lr * decay * W - lr * scale * P @ N @ Q.T
        move(p, optimizer, torch.tensor(G))
        np.testing.assert_allclose(p.detach().numpy(), W, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", SIDES)
def test_columns_are_orthonormal_and_the_best_subspace(side, dtype):
    G = random(9, 7).to(dtype)
    found = projectors(G, rank=3, side=side)
    expected = {"std": "Q", "reverse_std": "P", "left": "P", "right": "Q", "full": "PQ"}[side]
    assert "".join(found) == expected
    singular_values = np.linalg.svd(G.double().numpy(), compute_uv=False)
    atol = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for name, V in found.items():
        assert V.dtype == dtype and V.shape == ((9, 3) if name == "P" else (7, 3))
        torch.testing.assert_close(V.mT @ V, torch.eye(3, dtype=dtype), atol=atol, rtol=0)
        kept = (G.mT if name == "P" else G).double() @ V.double()
        captured = kept.square().sum().item()
        assert captured == pytest.approx((singular_values[:3] ** 2).sum(), rel=2 * atol)
        assert V.gather(0, V.abs().argmax(0, keepdim=True)).min() > 0 and V.is_contiguous()
    for name, V in projectors(-G, rank=3, side=side).items():
        torch.testing.assert_close(V, found[name], atol=atol, rtol=0)


def whole(net) -> tuple[Any, list[nn.Parameter]]:
    net.requires_grad_(True)
    return net, list(net.parameters())


def random_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize(("side", "gap"), [("std", 3), *((side, 1) for side in SIDES)])
def test_full_rank_sgd_is_sgd(side, gap):
    """On a whole model, with weight decay; the longer side holds a gradient only when it is new."""
    (ours, p), (_, q) = whole(tiny_gpt2().double()), whole(tiny_gpt2().double())
    changes = {"core": "sgd", "rank": 16, "side": side, "update_gap": gap, "weight_decay": 0.1}
    projected = galore(p, **changes)
    projected.attach(ours)
    sgd = torch.optim.SGD(q, lr=0.1, weight_decay=0.1)
    for seed in range(5):
        for params, optimizer in ((p, projected), (q, sgd)):
            random_gradients(params, seed)
            optimizer.step()
    for one, other in zip(p, q, strict=True):
        torch.testing.assert_close(one, other, atol=1e-13, rtol=0)
    states = [projected.state[one] for one in p if one in projected.matrices]
    assert len(states) == 12 and all(state.keys() & {"P", "Q"} for state in states)


def test_full_rank_adam_is_not_adam():
    p, optimizer = one_layer(torch.zeros(4, 6).double(), rank=4)
    moved = move(p, optimizer, random(4, 6))
    assert (moved + 0.1 * random(4, 6).sign()).abs().max() > 0.05  # Adam's first step: -lr sign G


@pytest.mark.parametrize("make_net", [tiny_gpt2, tiny_llama])
def test_all_but_linear_layers_get_torchs_adamw(make_net):
    (ours, p), (_, q) = whole(make_net()), whole(make_net())
    settings = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6, "betas": (0.8, 0.9)}
    projected = galore(p, **settings)
    projected.attach(ours)
    adamw = torch.optim.AdamW(q, fused=True, **settings)
    for seed in range(5):
        for params, optimizer in ((p, projected), (q, adamw)):
            random_gradients(params, seed)
            optimizer.step()
    pairs = zip(ours.named_parameters(), q, strict=True)
    same = {name for (name, one), other in pairs if one.equal(other)}
    linear = {f"{name}.weight" for name, m in ours.named_modules() if isinstance(m, nn.Linear)}
    everything = {name for name, _ in ours.named_parameters()}
    assert same == everything - linear and linear & everything and same & everything


def test_an_untied_head_is_no_projected_layer():
    net = tiny_llama()
    net.lm_head.weight = nn.Parameter(net.lm_head.weight.detach().clone())
    net, params = whole(net)
    optimizer = galore(params)
    optimizer.attach(net)
    assert len(optimizer.matrices) == 21 and net.lm_head.weight not in optimizer.matrices


@pytest.mark.parametrize(
    ("shape", "side", "expected"),
    [
        ((4, 6), "std", {"P": (4, 2), "exp_avg": (2, 6), "exp_avg_sq": (2, 6)}),
        ((6, 4), "std", {"Q": (4, 2), "exp_avg": (6, 2), "exp_avg_sq": (6, 2)}),
        ((4, 6), "reverse_std", {"Q": (6, 2), "exp_avg": (4, 2), "exp_avg_sq": (4, 2)}),
        ((6, 4), "left", {"P": (6, 2), "exp_avg": (2, 4), "exp_avg_sq": (2, 4)}),
        ((4, 6), "full", {"P": (4, 2), "Q": (6, 2), "exp_avg": (2, 2), "exp_avg_sq": (2, 2)}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_small_and_of_the_weights_dtype(shape, side, expected, dtype):
    p, optimizer = one_layer(torch.zeros(shape, dtype=dtype), side=side, rank=2)
    moved = move(p, optimizer, random(*shape).to(dtype))
    state = dict(optimizer.state[p])
    assert state.pop("step") == 1
    assert {name: tuple(t.shape) for name, t in state.items()} == expected
    assert {t.dtype for t in state.values()} == {dtype} and all(t.any() for t in state.values())
    assert 1 <= torch.linalg.matrix_rank(moved.double(), rtol=0.02) <= 2


def test_sgd_keeps_no_moments():
    p, optimizer = one_layer(torch.zeros(4, 6), core="sgd", rank=2)
    move(p, optimizer, random(4, 6).float())
    assert optimizer.state[p].keys() == {"step", "P"}


def test_the_projector_is_found_anew_every_gap_steps_only():
    p, optimizer = one_layer(torch.zeros(6, 4).double(), rank=2, update_gap=3)
    found = []
    for k in range(7):
        moved = move(p, optimizer, random(6, 4, seed=k))
        assert torch.linalg.matrix_rank(moved) == 2
        found.append(optimizer.state[p]["Q"].clone())
    for k, Q in enumerate(found):
        fresh = projectors(random(6, 4, seed=k - k % 3), rank=2, side="std")["Q"]
        assert torch.equal(Q, fresh)
    assert torch.linalg.matrix_rank(p) == 4  # two subspaces make more than one's rank


def test_a_rank_above_a_side_names_the_layer():
    net, params = whole(tiny_llama())
    with pytest.raises(InputError, match=r"^optimizer\.rank=9: .* 1 to 8 .*k_proj\)$"):
        galore(params, rank=9).attach(net)


@pytest.mark.parametrize("name", ["lora", "layernorm"])
def test_a_method_without_a_linear_weight_is_refused(name):
    net: Any = tiny_llama()
    make(name, net).attach(net)
    optimizer = galore(trained(net))
    with pytest.raises(InputError, match="^optimizer=galore: .*method=full"):
        optimizer.attach(net)


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 0),
        ("rank", 2.5),
        ("update_gap", 0),
        ("scale", 0),
        ("scale", float("nan")),
        ("side", "both"),
        ("core", "adafactor"),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("per_layer", "yes"),
    ],
)
def test_a_wrong_setting_is_one_line(key, value):
    with pytest.raises(InputError, match=rf"^optimizer\.{key}=[^\n]*: [^\n]+$"):
        galore([nn.Parameter(torch.ones(2, 2))], **{key: value})


def test_a_closure_is_called_with_gradients_on():
    p, optimizer = one_layer(torch.ones(2, 2))

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert p.max() < 1


def backward(net, tokens):
    logits = net(tokens, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


@pytest.mark.parametrize("make_net", [tiny_gpt2, tiny_llama])
def test_within_backward_one_gradient_is_alive_and_numbers_are_the_same(make_net, tokens):
    (plain, p), (layered, q) = whole(make_net()), whole(make_net())
    alive = []
    for one in q:  # registered first, so called while the gradient is still there
        one.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(x.grad is not None for x in q))
        )
    changes: Any = {"lr": 1e-2, "rank": 3, "update_gap": 2, "weight_decay": 0.1}
    optimizers = [galore(p, **changes), galore(q, **changes, per_layer=True)]
    for net, optimizer in zip((plain, layered), optimizers, strict=True):
        optimizer.attach(net)
    for _ in range(4):
        backward(plain, tokens)
        norm = nn.utils.get_total_norm([one.grad for one in p if one.grad is not None])
        backward(layered, tokens)
        assert optimizers[1].gradient_norm().equal(norm)
        assert all(one.grad is None for one in q)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert len(alive) == 4 * len(q) and set(alive) == {1}
    start = make_net().parameters()
    for one, other, before in zip(p, q, start, strict=True):
        assert one.equal(other) and not one.equal(before)


def test_a_second_backward_in_a_step_is_refused():
    p, optimizer = one_layer(torch.ones(2, 2), per_layer=True)
    for _ in range(2):
        p.square().sum().backward()
        optimizer.step()
    p.square().sum().backward()
    with pytest.raises(RuntimeError, match="one backward pass per step"):
        p.square().sum().backward()


def test_a_gradient_that_is_not_finite_moves_nothing_within_backward():
    p, optimizer = one_layer(torch.ones(2, 2), per_layer=True)
    (p.sum() * float("inf")).backward()
    assert optimizer.gradient_norm().isinf() and p.equal(torch.ones(2, 2)) and p.grad is None


GALORE = ("optimizer=galore", "optimizer.rank=8", "optimizer.update_gap=4", "optimizer.scale=1.0")


@pytest.mark.parametrize("method", [("method=full",), ("method=top_layers", "method.k=1")])
def test_runs_learn_and_per_layer_changes_no_number(compose, tmp_path, method):
    words = (*GALORE, *method, "method.lr=1e-3", "epochs=1")
    plain = go(compose(*words), tmp_path / "plain")
    layered = go(compose(*words, "optimizer.per_layer=true"), tmp_path / "layered")
    assert plain["status"] == layered["status"] == "completed"
    assert plain["final"]["train_bits_per_token"] < plain["base"]["train_bits_per_token"] - 0.5
    assert rows_of(tmp_path / "plain") == rows_of(tmp_path / "layered")
    ours, theirs = adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "layered")
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert plain["final"] == layered["final"]
    assert plain["cost"]["step_flops"] == layered["cost"]["step_flops"] > 0


@pytest.mark.parametrize("per_layer", ["true", "false"])
def test_interrupted_equals_uninterrupted(compose, tmp_path, per_layer):
    """Stopped between two searches for the subspace: the projector is part of the checkpoint."""
    words = (*GALORE, "method=top_layers", "method.k=1", "method.lr=1e-3", "epochs=1")
    config = compose(*words, f"optimizer.per_layer={per_layer}")
    whole_run = go(config, tmp_path / "whole")
    at = {"_target_": "test_run.SignalAt", "row": 5, "number": int(signal.SIGTERM)}
    with pytest.raises(Halted):
        go(config | {"tracking": at}, tmp_path / "cut")
    resumed = go(config, tmp_path / "cut")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    ours, theirs = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert resumed["final"] == whole_run["final"]


@pytest.mark.parametrize("per_layer", ["true", "false"])
def test_divergence_is_told_and_is_no_crash(compose, tmp_path, per_layer):
    words = (*GALORE, "method=top_layers", "method.k=1", "method.lr=1e38")
    result = go(compose(*words, f"optimizer.per_layer={per_layer}"), tmp_path / "run")
    assert result["status"] == "diverged" and "is nan" in result["error"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.clip=1.0", r"^optimizer\.clip=1\.0: null, as .* within backward$"),
        ("micro_batch=2", r"^micro_batch=2: batch \(4\), as .* within backward$"),
        ("optimizer.side=up", r"^optimizer\.side=up: one of std, reverse_std, left, right, full$"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_loaded(compose, change, message):
    words = ("optimizer=galore", "optimizer.per_layer=true", "method=full", "model=hub")
    with pytest.raises(InputError, match=message):
        assemble(compose(*words, "model.path=nobody/nothing", change))

import numpy as np
import pytest
import torch
from oracle import low_rank_changes, spaces, weights

from peftlab.analyses.amplification import layer_of
from peftlab.changes import Change


def look(W, delta, rank, seed=0):
    W, delta = (torch.as_tensor(m, dtype=torch.float64) for m in (W, delta))
    return layer_of(Change("x", "q", W, delta), rank, torch.Generator().manual_seed(seed))


def test_a_multiple_of_the_leading_part_of_w():
    W = torch.randn(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    delta = -2.5 * U[:, :3] * s[:3] @ Vh[:3]
    layer = look(W, delta, 8)
    assert layer.r == 3
    assert layer.amplification[:2] == pytest.approx((2.5, 2.5))
    assert layer.amplification[2] > 5  # random directions hold less
    assert layer.share == pytest.approx(2.5 * (s[:3].norm() / s.norm()).item())


def test_directions_that_w_does_not_emphasise():
    W = np.diag([5.0, 4.0, 3.0, 0.1, 0.05])
    delta = np.diag([0.0, 0.0, 0.0, 0.3, 0.4])
    layer = look(W, delta, 2)
    size = 0.5  # of ΔW; W has √(0.1² + 0.05²) there, and √(5² + 4²) in its own first two
    assert layer.amplification[:2] == pytest.approx((size / 0.0125**0.5, size / 41**0.5))
    assert look(W, delta, 1).amplification[0] == pytest.approx(0.4 / 0.05)
    random = [look(W, delta, 2, seed).amplification[2] for seed in range(300)]
    parts = (size / np.array(random)) ** 2  # ‖UᵀWV‖² is r² / (d_out d_in) ‖W‖² on average
    mean, error = parts.mean(), parts.std() / 300**0.5
    expected = 4 / 25 * (W**2).sum()
    assert error < 0.07 * expected and abs(mean - expected) < 4 * error


def test_a_run(finished, ask):
    folder = finished("method=lora", "method.rank=2", "seed=0")
    answer = ask("amplification", folder)
    own, most = [], []
    frozen = weights()
    for layer, delta in low_rank_changes(folder).items():
        U, s, V = spaces(delta)
        size = np.linalg.norm(s[:2])
        own.append(size / np.linalg.norm(U[:, :2].T @ frozen[layer] @ V[:, :2]))
        most.append(size / np.linalg.norm(np.linalg.svd(frozen[layer], compute_uv=False)[:2]))
    row = answer["rows"][-1]
    assert (row["kind"], row["layers"], row["r"]) == ("all", 16, 2)
    assert row["ΔW's own U and V"] == pytest.approx(np.median(own), rel=1e-6)
    assert row["W's own U and V"] == pytest.approx(np.median(most), rel=1e-6)
    assert row["W's own U and V"] < row["random U and V"]
    assert [trace["name"] for trace in answer["figures"][0]["traces"]] == [
        "ΔW's own",
        "W's own",
        "random",
    ]

import math

import numpy as np
import pytest
import torch
from oracle import low_rank_changes, result, weights

from peftlab.analyses.spectrum import directions_for, effective_rank, spectrum_of, stable_rank


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 3, 10, 30, 97])
def test_all_directions_alike(n):
    found = spectrum_of("q", "W", torch.eye(n, dtype=torch.float64), 0.9)
    assert found.directions == math.ceil(round(0.9 * n, 9))
    assert found.rank == n
    assert (found.effective, found.stable) == pytest.approx((n, n))


def test_by_hand():
    s = values(3, 1)  # p = 3/4, 1/4
    assert effective_rank(s) == pytest.approx(4 / 3**0.75)
    assert stable_rank(s) == pytest.approx(10 / 9)
    assert directions_for(s, 0.9) == 1 and directions_for(s, 0.91) == 2
    assert effective_rank(values(2, 0)) == pytest.approx(1)
    s = values(4, 2, 2, 1)  # squares 16, 4, 4, 1 of 25
    assert [directions_for(s, share) for share in (0.64, 0.65, 0.8, 0.96, 0.97)] == [1, 2, 2, 3, 4]


def test_a_product_of_rank_r_has_r():
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(*k, generator=generator).double() for k in ((20, 3), (3, 15)))
    found = spectrum_of("q", "ΔW", B @ A, 0.9)
    assert found.rank == 3 and 1 <= found.directions <= 3 and found.most == 15
    assert 1 <= found.stable <= found.effective <= 3


def test_runs(finished, ask):
    folder = finished("method=lora", "method.rank=2", "seed=0")
    answer = ask("spectrum", folder, finished("method=full"))
    changed, frozen = low_rank_changes(folder), weights()
    rows = {(r["run"], r["matrix"]): r for r in answer["rows"] if r["kind"] == "all"}
    names = sorted({run for run, _ in rows})
    assert names == ["full", "lora"]

    def needed(matrix):
        squares = np.linalg.svd(matrix, compute_uv=False) ** 2
        return np.searchsorted(np.cumsum(squares), 0.9 * squares.sum()) + 1

    expected = {
        "W": [needed(frozen[layer]) for layer in changed],
        "ΔW": [needed(delta) for delta in changed.values()],
        "W'": [needed(frozen[layer] + delta) for layer, delta in changed.items()],
    }
    for matrix, counts in expected.items():
        assert rows["lora", matrix]["for 90 %"] == pytest.approx(np.mean(counts))
    change, whole = rows["lora", "ΔW"], rows["full", "ΔW"]
    assert (change["rank"], change["layers"]) == (2, 16)
    trained = result(folder)["method"]["trainable_params"]
    assert change["rank per 1,000 trained"] == pytest.approx(1000 * 2 * 16 / trained)
    assert whole["rank"] == 192 and whole["for 90 %"] > change["for 90 %"]
    assert rows["full", "W"] | {"run": "lora"} == rows["lora", "W"]
    (bars,) = (t for t in answer["figures"][0]["traces"] if t["name"] == "ΔW")
    assert bars["x"] == ["lora", "full"]
    assert bars["y"][0] == pytest.approx(np.mean(expected["ΔW"]) / 192)


def test_share_is_checked(finished, refused):
    run = finished("method=full")
    assert "--share=1.5: between 0 and 1" in refused("spectrum", run, "--share", 1.5)

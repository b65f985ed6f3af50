import numpy as np
import pytest
import torch
from oracle import low_rank_changes, spaces

from peftlab.analyses.subspace import Overlap, mean_phi, phi
from peftlab.changes import drawn


def columns(d, k, seed):
    return drawn(d, k, torch.Generator().manual_seed(seed))


def test_equal_orthogonal_and_nested_subspaces():
    Q = columns(12, 7, 0)
    same = phi(Q[:, :4], Q[:, :4])
    torch.testing.assert_close(same, torch.ones_like(same))
    assert phi(Q[:, :3], Q[:, 3:]).abs().max() < 1e-24
    # columns 0 1 and 1 2 3: φ(1, 1) = 0, φ(2, 1) = 1, φ(2, 3) = 1/2
    nested = phi(Q[:, :2], Q[:, 1:4])
    torch.testing.assert_close(nested, torch.tensor([[0.0, 0, 0], [1, 0.5, 0.5]]).double())


def test_against_the_definition_and_turned():
    U, V = columns(9, 4, 1), columns(9, 6, 2)
    a, b = U.numpy(), V.numpy()
    expected = [
        [np.linalg.norm(a[:, :i].T @ b[:, :j]) ** 2 / min(i, j) for j in range(1, 7)]
        for i in range(1, 5)
    ]
    np.testing.assert_allclose(phi(U, V), expected, atol=1e-14)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    signs = torch.tensor([1.0, -1, -1, 1, -1, 1])
    turned = phi(U @ turn, V * signs)[-1]
    torch.testing.assert_close(turned, phi(U, V)[-1])


def test_by_chance_is_the_mean_of_drawn_pairs():
    generator = torch.Generator().manual_seed(0)
    d, i, j = 20, 3, 5
    values = [phi(drawn(d, i, generator), drawn(d, j, generator))[-1, -1] for _ in range(600)]
    mean, error = np.mean(values), np.std(values) / 600**0.5
    assert error < 0.005 and abs(mean - j / d) < 4 * error


def test_layers_with_fewer_directions_do_not_count_where_they_have_none():
    few, more = torch.full((1, 2), 0.5), torch.tensor([[0.1, 0.3], [0.2, 0.4]])
    overlaps = [Overlap("q", few, 0, 0), Overlap("q", more, 0, 0)]
    np.testing.assert_allclose(mean_phi(overlaps), [[0.3, 0.4], [0.2, 0.4]], atol=1e-7)


def test_two_runs(finished, ask):
    runs = [finished("method=lora", f"method.rank={r}", f"seed={s}") for r, s in ((2, 0), (4, 1))]
    answer = ask("subspace", *runs)
    assert "lora rank=2 seed=0 ~ lora rank=4 seed=1" in answer["title"]
    first, second = map(low_rank_changes, runs)
    values = {"input": [], "output": []}
    for layer in first:
        (U, _, V), (S, _, T) = spaces(first[layer]), spaces(second[layer])
        for side, (a, b) in {"input": (V, T), "output": (U, S)}.items():
            both = [
                np.linalg.norm(a[:, :i].T @ b[:, :j]) ** 2 / min(i, j) for i, j in ((1, 1), (2, 4))
            ]
            values[side].append((*both, 4 / len(a)))
    assert len(first) == 16
    for side, found in values.items():
        (row,) = (r for r in answer["rows"] if r["side"] == side and r["kind"] == "all")
        told = [row[key] for key in ("φ(1, 1)", "φ(i, j)", "by chance")]
        assert told == pytest.approx(np.mean(found, 0), rel=1e-6)
        assert (row["layers"], row["i"], row["j"]) == (16, 2, 4)
        assert row["drawn"] == pytest.approx(row["by chance"], rel=0.5)
    kinds = [r["kind"] for r in answer["rows"] if r["side"] == "input"]
    assert kinds == ["qkv", "o", "up", "down", "all"]
    heat, layers = answer["figures"][:2]
    assert np.shape(heat["traces"][0]["z"]) == (2, 4)
    assert heat["traces"][0]["z"][1][3] == pytest.approx(np.mean(values["input"], 0)[1])
    assert [len(trace["y"]) for trace in layers["traces"]] == [4] * 4


def test_three_runs_and_fewer_directions(finished, ask):
    runs = [finished("method=lora", f"method.rank={r}", f"seed={s}") for r, s in ((2, 0), (4, 1))]
    answer = ask("subspace", *runs, finished("method=full"), "--top", 3)
    assert [r["runs"] for r in answer["rows"]][::2] == [
        "lora rank=2 seed=0 ~ lora rank=4 seed=1",
        "lora rank=2 seed=0 ~ full seed=0",
        "lora rank=4 seed=1 ~ full seed=0",
    ]
    assert [(r["i"], r["j"]) for r in answer["rows"]][::2] == [(2, 3), (2, 3), (3, 3)]
    cells = answer["figures"][0]["traces"][0]["z"]
    assert cells[0][0] is None and cells[0][1] == cells[1][0] == answer["rows"][0]["φ(i, j)"]


def test_refused(finished, refused):
    run, prompt = (
        finished("method=lora", "method.rank=2", "seed=0"),
        finished("method=prompt_tuning"),
    )
    assert "at least two runs" in refused("subspace", run, run)
    line = refused("subspace", run, prompt)
    assert "has no change of weights" in line and "it is input, and changes no weight" in line
    assert "--top=0: at least 1" in refused("subspace", run, prompt, "--top", 0)

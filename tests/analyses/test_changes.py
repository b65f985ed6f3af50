import numpy as np
import pytest
import torch
from conftest import attach, make, tiny_llama
from oracle import low_rank_changes, weights
from safetensors.numpy import load_file

from peftlab.cards import card, method_names
from peftlab.changes import changes, directions, rank
from peftlab.method import trainable
from peftlab.recorded import read_record

MERGEABLE = [name for name in method_names() if not card(name).merge.startswith("no")]


@pytest.mark.parametrize("name", MERGEABLE)
def test_merging_in_float64_is_merging_in_float32_with_more_digits(name):
    merged = []
    for double in (False, True):
        net = tiny_llama(layers=2)
        method = make(name, net)
        attach(method, net)
        generator = torch.Generator().manual_seed(4)
        for _, p in trainable(net):
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.1)
        method.compact()
        if double:
            net.double()
        method.merge(net)
        merged.append({key: p.detach() for key, p in net.named_parameters()})
    moved = 0
    start = dict(tiny_llama(layers=2).named_parameters())
    for key, p in merged[0].items():
        assert p.dtype == torch.float32 and merged[1][key].dtype == torch.float64
        torch.testing.assert_close(merged[1][key].float(), p, atol=3e-6, rtol=1e-5)
        moved += key not in start or not torch.equal(p, start[key])
    assert moved


def test_change_of_a_low_rank_run(finished):
    folder = finished("method=lora", "method.rank=2", "seed=0")
    expected, frozen = low_rank_changes(folder), weights()
    found = list(changes(read_record(folder)))
    assert [change.name for change in found] == list(expected) and len(found) == 16
    for change in found:
        W, delta = change.W.numpy(), change.delta.numpy()
        np.testing.assert_array_equal(W, frozen[change.name])
        np.testing.assert_allclose(delta, expected[change.name], atol=1e-15 * np.abs(W).max())
        assert len(directions(change.delta).s) == 2  # although it is the difference of two matrices
    assert [change.kind for change in found[:4]] == ["qkv", "o", "up", "down"]


def test_change_of_a_run_that_trains_the_weights_themselves(finished):
    folder = finished("method=full")
    trained, frozen = load_file(folder / "adapter.safetensors"), weights()
    for change in changes(read_record(folder)):
        expected = trained[f"{change.name}.weight"].astype(float) - frozen.pop(change.name)
        np.testing.assert_array_equal(change.delta, expected)
        assert np.abs(expected).max() > 0
    assert not frozen


def test_rank_is_numerical():
    U, V = torch.eye(6, dtype=torch.float64)[:, :3], torch.eye(5, dtype=torch.float64)[:, :3]
    matrix = U @ torch.diag(torch.tensor([1.0, 1e-10, 1e-17]).double()) @ V.T
    s = torch.linalg.svdvals(matrix)
    assert rank(s, matrix) == 2
    assert directions(matrix, 1).U.shape == (6, 1) and directions(matrix).V.shape == (5, 2)


def test_layers_norms_change_no_matrix(finished, refused):
    line = refused("spectrum", finished("method=layernorm"))
    assert "a run that changed a weight matrix; layernorm changed none" in line

from copy import deepcopy

import pytest
import torch
from conftest import VOCABULARY, attach, make, shake, tiny_gpt2, tiny_llama

from peftlab.data import Batch
from peftlab.errors import InputError
from peftlab.fit import nats_of

SCORES = ("random", "magnitude", "snip")


def batch_of(tokens):
    return Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), None, tokens[:, :-1].numel())


def batches():
    ids = torch.randint(VOCABULARY, (6, 9), generator=torch.Generator().manual_seed(7))
    return [batch_of(ids)]


def dense(method):
    """All D and U with zeros where nothing is chosen, by hand."""
    flat = torch.zeros(method.n)
    flat[method.index] = method.values.detach()
    found, at = [], 0
    for d_out, d_in in method.shapes:
        found.append(flat[at : at + d_out * d_in].view(d_out, d_in))
        at += d_out * d_in
    assert at == method.n
    return found


def into_houlsby(method, other):
    """Give a dense adapter the weights of the sparse one."""
    matrices = dense(method)
    with torch.no_grad():
        for i, (t, own) in enumerate(zip(method.tensors, other.tensors, strict=True)):
            own.D.copy_(matrices[2 * i])
            own.U.copy_(matrices[2 * i + 1])
            own.b_D.copy_(t.b_D)
            own.b_U.copy_(t.b_U)


@pytest.mark.parametrize("score", SCORES)
def test_it_is_houlsbys_adapter_with_zeros(score, net, tokens, expect_close):
    other, base = deepcopy(net), net(tokens).logits
    method = make("sparse_adapter", net, score=score)
    attach(method, net)
    shake(method, 0.3)
    twin = make("houlsby", other, activation="relu")
    twin.attach(other)
    into_houlsby(method, twin)
    assert (net(tokens).logits - base).abs().max() > 0.1
    expect_close(net(tokens).logits, other(tokens).logits)


def test_keeping_all_trains_as_the_dense_adapter(net, tokens, expect_close):
    other = deepcopy(net)
    method = make("sparse_adapter", net, keep=1.0)
    attach(method, net)
    twin = make("houlsby", other, activation="relu")
    twin.attach(other)
    into_houlsby(method, twin)
    assert sum(p.numel() for p in method.parameters()) == sum(p.numel() for p in twin.parameters())
    start = net(tokens).logits
    for model, adapter in ((net, method), (other, twin)):
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            nats_of(model, batch_of(tokens)).backward()
            optimizer.step()
    assert (net(tokens).logits - start).abs().max() > 0.1
    expect_close(net(tokens).logits, other(tokens).logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("keep", [0.1, 0.37, 0.6])
def test_density_is_exact_and_what_is_left_out_stays_0(keep, score, tokens):
    net = tiny_llama()
    method = make("sparse_adapter", net, keep=keep, score=score)
    attach(method, net)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        nats_of(net, batch_of(tokens)).backward()
        optimizer.step()
    n = 6 * 2 * 3 * 16
    k = int(keep * n)
    assert len(method.values) == k == len(method.index.unique()) and method.n == n
    seen: list[torch.Tensor] = []
    spy = net.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda *_: seen.extend(m for t in method.tensors for m in (t.D, t.U))
    )
    net(tokens)
    spy.remove()
    flat = torch.cat([m.flatten() for m in seen]).detach()
    left_out = torch.ones(n, dtype=torch.bool)
    left_out[method.index] = False
    assert not flat[left_out].any() and int(left_out.sum()) == n - k
    assert torch.equal(flat[method.index], method.values.detach())
    assert int((flat != 0).sum()) > 0.6 * k  # U has left 0, but where ReLU lets nothing through


def test_large_sparse_has_the_size_of_the_small_dense_adapter():
    net = tiny_llama()
    small = make("houlsby", net, bottleneck=8)
    large = make("sparse_adapter", net, bottleneck=32, keep=0.25)
    weights = sum(t.D.numel() + t.U.numel() for t in small.tensors)
    assert len(large.values) == weights == 6 * 2 * 8 * 16


def draw(method):
    """The draw of D and U that prepare makes, from the same random state."""
    parts = [torch.empty(shape) for shape in method.shapes]
    for part in parts:
        torch.nn.init.trunc_normal_(part, std=method.std, a=-2 * method.std, b=2 * method.std)
    return parts


def prepared(net, **changes):
    method = make("sparse_adapter", net, **changes)
    method.attach(net)
    torch.manual_seed(11)
    method.prepare(lambda b: nats_of(net, b), batches())
    torch.manual_seed(11)
    return method, draw(method)


def test_magnitude_keeps_the_largest_of_both_and_u_starts_at_0(net):
    method, start = prepared(net, score="magnitude", keep=0.3)
    flat = torch.cat([part.flatten() for part in start])
    expected = flat.abs().topk(method.k).indices.sort().values
    assert torch.equal(method.index, expected)
    now = dense(method)
    chosen = torch.zeros(method.n, dtype=torch.bool)
    chosen[method.index] = True
    sizes = [part.numel() for part in start]
    for matrix, first, part in zip(now, start, chosen.split(sizes), strict=True):
        mask = part.view(matrix.shape)
        is_down = matrix.shape[0] == 3
        assert 0 < mask.sum() < mask.numel()
        assert torch.equal(matrix, first * mask if is_down else torch.zeros_like(matrix))


def test_snip_is_weight_times_gradient_of_the_dense_adapter(net):
    other = deepcopy(net)
    method, start = prepared(net, score="snip", keep=0.3, std=0.1, n_examples=50)
    twin = make("houlsby", other, activation="relu")
    twin.attach(other)
    with torch.no_grad():
        for t, D, U in zip(twin.tensors, start[0::2], start[1::2], strict=True):
            t.D.copy_(D)
            t.U.copy_(U)
    nats_of(other, batches()[0]).backward()
    scores = torch.cat(
        [(m * m.grad).abs().flatten() for t in twin.tensors for m in (t.D, t.U)]
    ).detach()
    torch.manual_seed(5)
    flat = torch.cat([part.flatten() for part in start])
    ours = method.scores(flat, lambda b: nats_of(net, b), batches())
    torch.testing.assert_close(ours, scores, rtol=1e-3, atol=1e-6)
    expected = scores.topk(method.k).indices.tolist()
    common = set(method.index.tolist()) & set(expected)
    assert len(common) >= method.k - 2  # rounding may swap neighbours
    assert scores.count_nonzero() > 0.8 * method.n  # at the real start, with U = 0, all are 0
    assert all(p.grad is None for p in method.parameters())


def test_scores_choose_differently(net):
    chosen = [tuple(prepared(deepcopy(net), score=s)[0].index.tolist()) for s in SCORES]
    assert len(set(chosen)) == 3


def test_bf16(tokens):
    net = tiny_gpt2().bfloat16()
    method = make("sparse_adapter", net)
    method.attach(net)
    with torch.autocast("cpu", torch.bfloat16):
        method.prepare(lambda b: nats_of(net, b), batches())
        shake(method)
        nats_of(net, batch_of(tokens)).backward()
    assert method.values.grad.dtype == torch.float32 and method.values.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sites": ["up"]}, "method.sites=up: this adapter belongs to the kind o or down"),
        ({"bottleneck": 0}, "method.bottleneck=0: a whole number of at least 1"),
        ({"keep": True}, "method.keep=True: a share in (0, 1]"),
        ({"keep": 1e-4}, "method.keep=0.0001: at least one of 576 weights of all adapters"),
        ({"score": "grasp"}, "method.score=grasp: one of random, magnitude, snip"),
        ({"n_examples": 0}, "method.n_examples=0: a whole number of at least 1"),
        ({"activation": "mish"}, "method.activation=mish: one of gelu, relu, swish, tanh"),
        ({"std": 0.0}, "method.std=0.0: a finite number above 0"),
    ],
)
def test_bad_input(changes, line):
    with pytest.raises(InputError) as caught:
        make("sparse_adapter", tiny_gpt2(), **changes)
    assert str(caught.value) == line

from copy import deepcopy

import pytest
import torch
from conftest import VOCABULARY, attach, make, shake, tiny_gpt2, tiny_llama
from torch import nn

from peftlab.data import Batch
from peftlab.errors import InputError
from peftlab.fit import nats_of
from peftlab.methods.fishmask import FishMask
from peftlab.sites import Site
from peftlab.sparse import Entries, drawn, largest


def batch_of(ids):
    return Batch(ids[:, :-1], ids[:, 1:].contiguous(), None, ids[:, :-1].numel())


def random_batch(rows=4, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return batch_of(torch.randint(VOCABULARY, (rows, 9), generator=generator))


def gradients(net, method, batch):
    """Of the frozen weights of all sites, by autograd itself."""
    weights = [site.module.weight for site in method.sites]
    for W in weights:
        W.requires_grad_(True)
    found = torch.autograd.grad(nats_of(net, batch), weights)
    for W in weights:
        W.requires_grad_(False)
    return found


class Gaussian(nn.Module):
    """y ~ N(W x, σ²); example i is row i of X with two residuals, ±σ, whose square is E[r²]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2, bias=False).requires_grad_(False)
        self.X, self.sigma = torch.randn(5, 3), 0.7

    @property
    def base_model(self):
        return self

    def forward(self, x):
        return self.linear(x)

    def nats(self, batch):
        (row,) = batch.ids[0, :1].tolist()
        signs = torch.tensor([1.0, -1.0]) if batch.targets[0, 0] else torch.tensor([-1.0, -1.0])
        x = self.X[row : row + 1]
        y = (x @ self.linear.weight.T + signs * self.sigma).detach()
        return ((y - self(x)) ** 2).sum() / (2 * self.sigma**2)


def test_fisher_of_a_linear_gaussian_model_is_the_analytic_one():
    net = Gaussian()
    sites = [Site("linear", "q", net.linear)]
    method = FishMask(sites, keep=0.5, n_examples=100, score="square", labels="data")
    method.attach(net)
    ids = torch.tensor([[row] for row in range(5)] * 2)
    targets = torch.tensor([[0]] * 5 + [[1]] * 5)
    (F,) = method.fisher(net.nats, [Batch(ids, targets, None, 10)])
    expected = (net.X**2).mean(0) / net.sigma**2  # E[x²] / σ², the same for both outputs
    torch.testing.assert_close(F, expected.expand(2, 3), rtol=1e-5, atol=1e-6)
    assert len(set(F[0].tolist())) == 3


@pytest.mark.parametrize("score", ["square", "absolute"])
def test_fisher_is_the_mean_over_single_examples(score, net):
    method = make("fishmask", net, score=score, n_examples=50)
    method.attach(net)
    batch = random_batch()
    measure = torch.square if score == "square" else torch.abs
    expected = [0.0 for _ in method.sites]
    for row in range(4):
        one = Batch(batch.ids[row : row + 1], batch.targets[row : row + 1], None, 8)
        found = gradients(net, method, one)
        expected = [total + measure(g) / 4 for total, g in zip(expected, found, strict=True)]
    actual = method.fisher(lambda b: nats_of(net, b), [batch])
    for F, by_hand in zip(actual, expected, strict=True):
        torch.testing.assert_close(F, by_hand, rtol=1e-4, atol=1e-6)
    # the squared gradient of a batch is another thing
    batched = [measure(g / 4) for g in gradients(net, method, batch)]
    k = method.k
    assert not torch.equal(largest(batched, k), largest(actual, k))
    assert method.chosen.values.grad is None
    assert [p for p in net.parameters() if p.requires_grad] == [method.chosen.values]


def test_sampled_labels_give_the_expectation_under_the_model():
    net = tiny_llama(1)
    method = make("fishmask", net, labels="sampled", n_examples=200)
    method.attach(net)
    ids = torch.tensor([[3, 1, 4]])
    scored = torch.tensor([[-100, -100, 5]])
    one = Batch(ids, scored, None, 3)
    p = net(ids).logits[0, -1].softmax(-1)
    expected = 0.0
    for y in range(VOCABULARY):
        label = scored.clone()
        label[0, 2] = y
        expected = expected + p[y] * gradients(net, method, one._replace(targets=label))[-1] ** 2
    torch.manual_seed(0)
    many = Batch(ids.expand(200, 3), scored.expand(200, 3), None, 600)
    F = method.fisher(lambda b: nats_of(net, b), [many])[-1]
    of_data = gradients(net, method, one)[-1] ** 2
    error = ((F - expected).norm() / expected.norm()).item()
    assert error < 0.3 < ((of_data - expected).norm() / expected.norm()).item()


def test_only_examples_asked_for_are_looked_at_and_the_seed_decides_which():
    net = tiny_llama(1)
    seen = []

    def nats(batch):
        seen.append(tuple(batch.ids[0].tolist()))
        return nats_of(net, batch)

    method = make("fishmask", net, n_examples=3)
    method.attach(net)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        method.prepare(nats, [random_batch(9), random_batch(8, seed=8)])
    assert len(seen) == 9 and seen[:3] == seen[3:6] != seen[6:]


def test_exactly_k_entries_differ_and_the_others_keep_their_bits(net, tokens):
    method = make("fishmask", net, keep=0.1)
    attach(method, net)
    before = [site.module.weight.clone() for site in method.sites]
    total = sum(W.numel() for W in before)
    assert method.k == int(0.1 * total) == len(method.chosen.index.unique())
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        nats_of(net, batch_of(tokens)).backward()
        optimizer.step()
    method.merge(net)
    pairs = zip(method.sites, before, strict=True)
    differ = torch.cat([(s.module.weight != W).flatten() for s, W in pairs])
    assert int(differ.sum()) == method.k
    assert torch.equal(differ.nonzero().flatten(), method.chosen.index)


def test_keeping_all_is_full_fine_tuning_of_the_sites(net, tokens, expect_close):
    other = deepcopy(net)
    method = make("fishmask", net, keep=1.0)
    attach(method, net)
    weights = [other.get_submodule(site.name).weight for site in method.sites]
    for W in weights:
        W.requires_grad_(True)
    ours = torch.optim.AdamW(method.parameters(), lr=1e-2, weight_decay=0.0)
    theirs = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    start = net(tokens).logits
    for _ in range(3):
        for model, optimizer in ((net, ours), (other, theirs)):
            optimizer.zero_grad()
            nats_of(model, batch_of(tokens)).backward()
            optimizer.step()
    assert (net(tokens).logits - start).abs().max() > 0.1
    expect_close(net(tokens).logits, other(tokens).logits, atol=1e-3, rtol=1e-3)


def test_gradient_of_values_is_that_of_the_weights_at_their_places(net):
    method = make("fishmask", net)
    attach(method, net)
    batch = random_batch()
    nats_of(net, batch).backward()
    whole = torch.cat([g.flatten() for g in gradients(net, method, batch)])
    torch.testing.assert_close(
        method.chosen.values.grad, whole[method.chosen.index], rtol=1e-4, atol=1e-5
    )


def test_in_bf16_a_change_below_the_weights_resolution_counts(tokens):
    net = tiny_llama().bfloat16()
    method = make("fishmask", net, keep=1.0)
    method.attach(net)
    with torch.autocast("cpu", torch.bfloat16):
        nats_of(net, batch_of(tokens)).backward()
        assert method.chosen.values.grad.dtype == torch.float32
        assert method.chosen.values.grad.abs().max() > 0
        site, t = method.sites[0], method.tensors[0]
        x = torch.ones(1, 16, dtype=torch.bfloat16)
        with torch.no_grad():
            method.chosen.values.fill_(1e-5)
            y = method.forward(t, site.module, x, torch.zeros(1, 16, dtype=torch.bfloat16))
    torch.testing.assert_close(y.float(), torch.full((1, 16), 16e-5), rtol=1e-2, atol=0)


def test_nothing_of_a_matrixs_size_is_kept_for_backward():
    entries = Entries([(300, 200)], 7, torch.device("cpu"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        entries.parts[0].linear(torch.randn(4, 200))
    assert 0 < max(kept) <= 4 * 200


def test_the_largest_of_all_scores_exactly_k_even_with_ties():
    scores = [torch.tensor([[1.0, 5.0], [2.0, 2.0]]), torch.tensor([7.0, 2.0, 0.0])]
    assert sorted({*largest(scores, 3).tolist()} - {2, 3, 5}) == [1, 4]  # and one of three 2s
    assert [len(largest(scores, k)) for k in range(1, 8)] == list(range(1, 8))
    many = [torch.randn(50, 40) for _ in range(5)]
    expected = torch.cat([s.flatten() for s in many]).topk(321).indices.sort().values
    assert torch.equal(largest(many, 321), expected)


def test_drawn_examples_end_at_their_last_target():
    targets = torch.tensor([[-100, 4, -100, -100], [-100, -100, -100, 2]])
    batch = Batch(torch.arange(8).view(2, 4), targets, None, 8)
    found = sorted(drawn([batch], 9), key=lambda e: len(e.ids))
    assert [e.ids.tolist() for e in found] == [[0, 1], [4, 5, 6, 7]]
    assert found[0].targets.tolist() == [-100, 4] and found[0].positions is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"keep": 0}, "method.keep=0: a share in (0, 1]"),
        ({"keep": 1.5}, "method.keep=1.5: a share in (0, 1]"),
        ({"keep": 1e-5}, "method.keep=1e-05: at least one of 9216 weights"),
        ({"n_examples": 0}, "method.n_examples=0: a whole number of at least 1"),
        ({"score": "l2"}, "method.score=l2: square or absolute"),
        ({"labels": "all"}, "method.labels=all: data or sampled"),
    ],
)
def test_bad_input(changes, line):
    with pytest.raises(InputError) as caught:
        make("fishmask", tiny_gpt2(), **changes)
    assert str(caught.value) == line


def test_after_loading_the_places_are_those_of_the_file(net, tokens):
    method = make("fishmask", net)
    attach(method, net)
    shake(method)
    logits = net(tokens).logits
    assert not torch.equal(method.chosen.index, torch.arange(method.k))
    twin = deepcopy(method.state_dict())
    method.chosen.choose(torch.arange(method.k))
    assert not torch.allclose(net(tokens).logits, logits, atol=1e-2)
    method.load_state_dict(twin)
    method.loaded()
    assert torch.equal(net(tokens).logits, logits)


def test_until_they_are_chosen_entries_are_spread_over_all_matrices():
    """What the estimate of memory sees, which never chooses."""
    entries = Entries([(30, 20), (30, 20), (60, 10)], 18, torch.device("cpu"))
    held = [int((part.slots < 18).sum()) for part in entries.parts]
    assert held == [6, 6, 6] == [len(part.at) for part in entries.parts]
    before = [part.at.clone() for part in entries.parts]
    entries.find()  # the same from `index` itself
    for part, at in zip(entries.parts, before, strict=True):
        assert torch.equal(part.at, at)


@pytest.mark.parametrize("k", [1, 7, 599, 1799, 1800])
def test_the_first_cut_is_what_index_says(k):
    entries = Entries([(30, 20), (30, 20), (60, 10)], k, torch.device("cpu"))
    before = [(part.at.clone(), part.slots.clone()) for part in entries.parts]
    assert len(set(entries.index.tolist())) == k and int(entries.index.max()) < 1800
    entries.find()
    for part, (at, slots) in zip(entries.parts, before, strict=True):
        assert torch.equal(part.at, at) and torch.equal(part.slots, slots)

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import make, shake, tiny_llama
from peft import LoKrConfig, get_peft_model
from peft.tuners.lokr.layer import factorization
from test_peft_agreement import close, loss_of

from peftlab.errors import InputError
from peftlab.sites import FAMILIES
from peftlab.sizes import split

# peft 0.21 asks transformers 5.23 by a name that is going away
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def test_a_number_is_split_as_in_peft():
    for n in range(1, 200):
        for factor in (-1, *range(1, 20), 500):
            assert split(n, factor) == factorization(n, factor), (n, factor)


def twins(method, theirs):
    """Pairs (our tensor or a part of it, peft's parameter), and a function of our gradient."""
    for site, t in zip(method.sites, method.tensors, strict=True):
        layer = theirs.base_model.model.get_submodule(site.name)
        yield t.W1, layer.lokr_w1["default"], lambda ours: ours
        if layer.lokr_w2:
            yield t.W2, layer.lokr_w2["default"], lambda ours: ours
        else:
            o_2 = layer.lokr_w2_a["default"].shape[0]
            yield t.W2, layer.lokr_w2_a["default"], lambda ours, n=o_2: ours[:, :n].T
            yield t.W2, layer.lokr_w2_b["default"], lambda ours, n=o_2: ours[:, n:]


@pytest.mark.parametrize("rank", [1, 3, 4])  # every W2 a product, some, none
@pytest.mark.parametrize("factor", [-1, 2])
def test_outputs_gradients_and_count_are_pefts(net, tokens, rank, factor):
    names = list(FAMILIES[net.config.model_type].values())
    method = make("lokr", net, rank=rank, alpha=6.0, factor=factor)
    config = LoKrConfig(r=rank, alpha=6, decompose_factor=factor, target_modules=names)
    theirs = get_peft_model(deepcopy(net), config).eval()
    base = net(tokens).logits
    method.attach(net)
    pairs = list(twins(method, theirs))
    assert {id(p) for p in theirs.parameters() if p.requires_grad} == {id(p) for _, p, _ in pairs}
    assert sum(p.numel() for p in method.parameters()) == sum(p.numel() for _, p, _ in pairs)
    for ours, p, part in pairs:
        assert part(ours).shape == p.shape
        p.data.copy_(part(ours.detach()))
    close(theirs(input_ids=tokens).logits, net(tokens).logits)
    shake(method)
    for ours, p, part in pairs:
        p.data.copy_(part(ours.detach()))
    logits = net(tokens).logits
    assert (logits - base).abs().max() > 1e-2
    close(theirs(input_ids=tokens).logits, logits)
    loss_of(net, tokens).backward()
    loss_of(theirs, tokens).backward()
    for ours, p, part in pairs:
        assert ours.grad.abs().max() > 1e-5 and p.grad is not None
        close(part(ours.grad), p.grad)


def test_forward_is_the_dense_product():
    method = make("lokr", tiny_llama(), sites=["gate"], rank=2, alpha=5.0)
    shake(method, std=0.5)
    site, t = method.sites[0], method.tensors[0]
    assert t.W1.shape == (4, 4) and t.W2.shape == (2, 6 + 4)
    W2 = t.W2[:, :6].T @ t.W2[:, 6:]
    x = torch.randn(3, 16)
    expected = F.linear(x, site.module.weight + 2.5 * torch.kron(t.W1, W2))
    y = site.module(x)
    assert (expected - y).abs().max() > 0.1
    torch.testing.assert_close(method(t, site.module, x, y), expected, atol=1e-4, rtol=1e-4)


def test_start():
    method = make("lokr", tiny_llama(), sites=["gate"], rank=2)
    assert not any(t.W1.any() for t in method.tensors)
    for columns, fan_in in ((slice(0, 6), 2), (slice(6, 10), 4)):  # W2a [6, 2] and W2b [2, 4]
        largest = max(t.W2[:, columns].abs().max() for t in method.tensors)
        assert 0.8 / math.sqrt(fan_in) < largest <= 1 / math.sqrt(fan_in)
    full = make("lokr", tiny_llama(), sites=["gate"], rank=3)
    largest = max(t.W2.abs().max() for t in full.tensors)
    assert full.tensors[0].W2.shape == (6, 4) and 0.8 / 2 < largest <= 1 / 2


def test_bad_values():
    for key, value, allowed in (
        ("rank", 0, "at least 1"),
        ("alpha", 0.0, "above 0"),
        ("factor", 0, "-1 .* or a whole number"),
        ("factor", 1.5, "-1 .* or a whole number"),
    ):
        with pytest.raises(InputError, match=rf"method\.{key}={value}: .*{allowed}"):
            make("lokr", tiny_llama(), **{key: value})

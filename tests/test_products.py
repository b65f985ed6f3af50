"""Products by oneDNN against float64, and runs that multiply by them against runs that do not."""

import json
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from conftest import attach, make, shake, tiny_llama
from torch import nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from peftlab import products
from peftlab.flops import FlopCounter
from peftlab.method import trainable
from peftlab.products import linear, outer, product, use_onednn_
from peftlab.run import SHELF, run

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a torch without oneDNN"
)


@pytest.fixture
def forced(monkeypatch):
    """All products in float32 by oneDNN, whatever the processor and the size."""
    monkeypatch.setattr(products, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(products, "SMALLEST", 0)
    monkeypatch.setattr(SHELF, "spare", None)


class Seen(TorchDispatchMode):
    """Whether the operator was called."""

    it = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.it = self.it or func._overloadpacket is torch.ops.peftlab.linear
        return func(*args, **(kwargs or {}))


def slopes(net: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    net.zero_grad()
    net(ids, use_cache=False).logits.square().sum().backward()
    return [cast(torch.Tensor, p.grad) for _, p in trainable(net)]


def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24)])
@pytest.mark.parametrize("width", [16, 200])
def test_output_and_gradients_are_those_of_float64(forced, shape, width):
    exact = [t.requires_grad_() for t in drawn(shape, (width, 24), (width,))]
    ours = [t.detach().float().requires_grad_() for t in exact]
    with FlopCounter() as counter:
        y = linear(*ours)
    assert counter.total == 2 * y.numel() * 24
    assert "peftlab_linear" in type(y.grad_fn).__name__
    assert y._base is None  # else what is added in place of it would be a copy
    expected = F.linear(*exact)
    (slope,) = drawn(y.shape)
    y.backward(slope.float())
    expected.backward(slope)
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wide", [2, 40])
def test_a_gradient_of_few_columns_is_the_same(forced, wide):
    slope, x = drawn((3, 5, wide), (3, 5, 4))
    expected = torch.einsum("bti,btj->ij", slope, x)
    torch.testing.assert_close(outer(slope.float(), x.float()), expected.float())


def test_the_operator_keeps_torchs_rules(forced):
    x, weight, bias = (t.float().requires_grad_() for t in drawn((3, 8), (5, 8), (5,)))
    torch.library.opcheck(products._linear, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_torch(forced, dtype):
    x, weight = (t.to(dtype) for t in drawn((6, 8), (5, 8)))
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(product(x, weight.T), x @ weight.T)
    layer = nn.Linear(8, 5, dtype=dtype)
    before = layer(x)
    use_onednn_(layer)
    assert type(layer) is products.Linear
    assert torch.equal(layer(x), before)


def test_small_products_are_left_to_torch(forced, monkeypatch):
    monkeypatch.setattr(products, "SMALLEST", 3 * 8 * 5 + 1)
    x, weight = (t.float().requires_grad_() for t in drawn((3, 8), (5, 8)))
    assert "peftlab" not in type(linear(x, weight).grad_fn).__name__
    monkeypatch.setattr(products, "SMALLEST", 3 * 8 * 5)
    assert "peftlab" in type(linear(x, weight).grad_fn).__name__


@pytest.mark.parametrize(
    "words",
    [
        ["method=lora"],
        ["method=dora", "method.detach_norm=false"],
        ["method=full"],
        ["method=krona"],
        ["method=fishmask"],
        ["method=lora", "model.quantize=nf4"],
    ],
    ids=" ".join,
)
def test_a_run_is_the_same_by_either_library(compose, tmp_path, monkeypatch, words):
    """To the rounding of float32."""
    config = compose(*words, "epochs=1", "optimizer.lr=1e-3")
    rows, results = {}, {}
    monkeypatch.setattr(products, "SMALLEST", 0)
    for onednn in (False, True):
        monkeypatch.setattr(products, "ONEDNN_IS_FASTER", onednn)
        monkeypatch.setattr(SHELF, "spare", None)
        folder = tmp_path / str(onednn)
        with Seen() as seen:
            results[onednn] = run(config, folder, trial=None, job_type="train")
        lines = (folder / "rows.jsonl").read_text().splitlines()
        rows[onednn] = [json.loads(line) for line in lines]
        assert seen.it is onednn
    assert results[True]["cost"]["step_flops"] == results[False]["cost"]["step_flops"]
    for a, b in zip(rows[True], rows[False], strict=True):
        assert a["bits_per_token"] == pytest.approx(b["bits_per_token"], rel=2e-5)


# dynamo looks at every tensor that it finds
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_block_takes_it_whole(forced):
    net = tiny_llama()
    method = make("lora", net)
    attach(method, net)
    shake(method)
    use_onednn_(net)
    ids = torch.arange(10).view(2, 5)
    plain = slopes(net, ids)
    for block in net.model.layers:
        block.compile(dynamic=True, fullgraph=True)
    with profile() as seen:
        compiled = slopes(net, ids)
    assert any(event.key == "peftlab::linear" for event in seen.key_averages())
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

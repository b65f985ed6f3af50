"""NF4: the codes against an independent reading, the layer against its dense twin, every seam."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import attach, make, shake
from torch import nn

from peftlab.backbone import load_backbone
from peftlab.checkpoint import load_adapter, save_adapter
from peftlab.data import Batch
from peftlab.errors import InputError
from peftlab.merging import merge_check
from peftlab.method import trainable
from peftlab.nf4 import (
    LEVELS,
    NF4Linear,
    bitsandbytes,
    decode,
    dequantize_,
    dynamic_levels,
    encode,
    pack,
    quantize_,
    restore_,
    unpack,
)
from peftlab.parts import assemble
from peftlab.run import run
from peftlab.sites import FAMILIES, find_sites

CPU = torch.device("cpu")
WIDEST = 0.15190360  # half of the widest gap, 1 - 0.6961928
METHODS = ["lora", "dora", "tied_lora", "pissa", "bitfit"]
SHAPES = [(7, 13), (16, 24), (130, 131)]  # a part of a block; whole blocks; 267 blocks, two scales


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def quantized(net):
    """`net`, quantised, and a copy of it with the decoded weights dense."""
    sites = find_sites(net, FAMILIES[net.config.model_type], "all")
    quantize_([site.module for site in sites], CPU)
    twin = deepcopy(net)
    dequantize_(twin)
    return net, twin


def loss_of(net, tokens):
    logits = net(tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batch_of(tokens):
    return Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), None, tokens[:, :-1].numel())


# The code.


def dynamic_by_hand():
    """The 256 levels of an absmax, in float64, by their definition."""
    found = {0.0, 1.0}
    for i in range(7):
        for k in range(2**i):
            centre = (0.1 + 0.9 * (2 * k + 1) / 2 ** (i + 1)) * 10.0 ** (i - 6)
            found |= {centre, -centre}
    return np.array(sorted(found))


def test_levels_of_an_absmax():
    expected = dynamic_by_hand()
    assert len(expected) == 256 == len(dynamic_levels(CPU))
    np.testing.assert_allclose(dynamic_levels(CPU).numpy(), expected, rtol=2e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_equals_an_independent_reading(shape):
    packed = pack(random(*shape))
    codes, absmax, scales, mean = (tensor.numpy() for tensor in packed)
    nested = dynamic_levels(CPU).numpy()
    expected = np.empty(shape[0] * shape[1], dtype=np.float32)
    for i in range(len(expected)):
        code = codes[i // 2] >> 4 if i % 2 == 0 else codes[i // 2] & 15
        block = i // 64
        scale = nested[absmax[block]] * scales[block // 256] + mean
        expected[i] = np.float32(LEVELS[code]) * scale
    assert np.array_equal(unpack(packed, shape, torch.float32).numpy().ravel(), expected)
    expected_bf16 = torch.from_numpy(expected).bfloat16().view(shape)
    assert torch.equal(unpack(packed, shape, torch.bfloat16), expected_bf16)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_code_is_the_nearest_level(shape):
    W = random(*shape)
    codes, absmax = encode(W)
    n = W.numel()
    blocks = np.pad(W.numpy().ravel(), (0, -n % 64)).reshape(-1, 64)
    assert np.array_equal(absmax.numpy(), np.abs(blocks).max(1))  # a part of a block has its own
    scaled = blocks / np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs(scaled.ravel()[:, None] - np.array(LEVELS, np.float32)).argmin(1)
    assert np.array_equal(np.stack((codes.numpy() >> 4, codes.numpy() & 15), 1).ravel(), nearest)
    # and so is that of every absmax
    packed = pack(W)
    mean = absmax.mean().item()
    for start in range(0, len(absmax), 256):
        part = absmax.numpy()[start : start + 256] - np.float32(mean)
        scale = np.abs(part).max()
        assert packed.scales[start // 256] == scale
        distance = np.abs(part[:, None] / scale - dynamic_by_hand())
        chosen = packed.absmax.numpy()[start : start + 256]
        np.testing.assert_allclose(distance[range(len(part)), chosen], distance.min(1), atol=1e-6)


def test_levels_times_absmax_come_back_exactly():
    absmax = torch.tensor([1e-30, 0.003, 1.0, 777.0])
    W = torch.tensor(LEVELS).repeat(4, 4) * absmax[:, None]
    codes, found = encode(W)
    assert torch.equal(found, absmax)
    assert codes[:8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert torch.equal(decode(codes, found, (4, 64), torch.float32), W)


def test_error_is_within_half_a_gap_and_the_absmax_element_is_exact():
    W = random(64, 640)
    codes, absmax = encode(W)
    error = (decode(codes, absmax, W.shape, torch.float32) - W).view(-1, 64)
    largest = W.view(-1, 64).abs().argmax(1, keepdim=True)
    assert error.gather(1, largest).abs().max() == 0
    relative = (error.abs() / absmax[:, None]).max()
    assert 0.14 < relative <= WIDEST + 1e-6


def test_double_quantisation_moves_an_absmax_by_less_than_half_a_gap():
    W = random(256, 128)
    _, absmax = encode(W)
    packed = pack(W)
    levels = dynamic_levels(CPU)[packed.absmax.long()]
    moved = levels * packed.scales.repeat_interleave(256)[: len(absmax)] + packed.mean - absmax
    bound = packed.scales.repeat_interleave(256)[: len(absmax)] * 0.9 / 128
    assert (moved.abs() <= bound * 1.001).all() and (moved.abs() > bound * 0.5).any()
    error = (unpack(packed, W.shape, torch.float32) - W).abs().view(-1, 64)
    assert (error <= (WIDEST * absmax + bound)[:, None] * 1.001).all()


def test_zero_blocks_stay_zero():
    assert torch.equal(unpack(pack(torch.zeros(3, 50)), (3, 50), torch.float32), torch.zeros(3, 50))
    W = random(4, 64)
    W[1] = 0
    found = unpack(pack(W), (4, 64), torch.float32)
    assert torch.equal(found[1], torch.zeros(64)) and found[[0, 2, 3]].abs().amin(0).max() > 0


def test_bits_per_weight():
    n = 256 * 256
    packed = pack(random(256, 256))
    assert packed.n_bytes * 8 == n * (4 + 8 / 64 + 32 / (64 * 256)) + 32  # 4.127 n; 32: the mean
    layer = nn.Linear(256, 256, bias=False)
    quantize_([layer], CPU)
    assert not list(layer.parameters())
    assert sum(b.numel() * b.element_size() for b in layer.buffers()) == packed.n_bytes


# The layer.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_layer_equals_the_dense_layer_with_gradients(dtype, autocast):
    torch.manual_seed(0)
    layer = nn.Linear(48, 40).to(dtype)
    layer.weight.requires_grad_(False)
    quantize_([layer], CPU)
    dense = deepcopy(layer)
    dequantize_(dense)
    assert isinstance(layer, NF4Linear) and type(dense) is nn.Linear
    assert dense.weight.dtype == dtype and not dense.weight.requires_grad
    x = random(3, 5, 48).to(torch.float32 if autocast else dtype)
    results = []
    for module in (layer, dense):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(given)
        (y.float() * random(3, 5, 40, seed=1)).sum().backward()
        results.append((y, given.grad, module.bias.grad))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_there_and_back_are_the_same_bits():
    first, last = nn.Linear(16, 24), nn.Linear(24, 8).bfloat16()
    net = nn.Sequential(first, nn.ReLU(), last)
    keys = list(net.state_dict())
    quantize_([first, last], CPU)
    before = deepcopy(net.state_dict())
    stored = dequantize_(net)
    assert sorted(net.state_dict()) == sorted(keys) and len(stored) == 2
    assert [first.weight.dtype, last.weight.dtype] == [torch.float32, torch.bfloat16]
    assert dequantize_(net) == {}
    for layer, packed in stored.items():
        restore_(layer, packed)
    after = net.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in after)
    assert last.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["lora", "dora", "tied_lora"])
def test_nothing_as_large_as_a_weight_is_kept_for_backward(name, net, tokens):
    def count_kept(net):
        """How many weights of sites and how many tensors of codes are kept."""
        make(name, net).attach(net)
        shapes = {tuple(site.module.weight.shape) for site in net.peft.sites}
        shapes |= {shape[::-1] for shape in shapes}
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss_of(net, tokens)
        weights = [t for t in kept if t.is_floating_point() and tuple(t.shape) in shapes]
        return len(weights), sum(t.dtype == torch.uint8 for t in kept)

    net, twin = quantized(net)
    weights, codes = count_kept(net)
    assert weights == 0 and codes > 0
    weights, codes = count_kept(twin)
    assert weights > 0 and codes == 0


# The methods.


@pytest.mark.parametrize("name", METHODS)
def test_three_steps_equal_those_on_the_dense_twin(name, net, tokens, expect_close):
    net, twin = quantized(net)
    base = net(tokens).logits
    expect_close(base, twin(tokens).logits, rtol=1e-6, atol=1e-6)
    losses = []
    for model in (net, twin):
        attach(make(name, model), model)
        expect_close(model(tokens).logits, base)
        optimizer = torch.optim.AdamW([p for _, p in trainable(model)], lr=3e-3)
        losses.append([])
        for _ in range(4):
            loss = loss_of(model, tokens)
            losses[-1].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0][3] < losses[0][0]
    expect_close(torch.tensor(losses[0]), torch.tensor(losses[1]))
    for (key, p), (other, q) in zip(sorted(trainable(net)), sorted(trainable(twin)), strict=True):
        assert key == other
        expect_close(p.grad, q.grad, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_merged_is_adapted_and_dense(name, net, tokens, expect_close):
    keys = set(net.state_dict())
    net, _ = quantized(net)
    method = make(name, net)
    attach(method, net)
    shake(method)
    given = {n for n, _ in trainable(net) if not n.startswith("peft.")}
    adapted = net(tokens).logits
    method.merge(net)
    expect_close(net(tokens).logits, adapted)
    if name != "bitfit":  # which has nothing to write into a weight: the codes stay
        assert set(net.state_dict()) == keys | given
        assert not any(isinstance(m, NF4Linear) for m in net.modules())


@pytest.mark.parametrize("name", METHODS)
def test_save_and_load_on_a_quantised_backbone(name, net, tokens, tmp_path):
    net, _ = quantized(net)
    other = deepcopy(net)
    method = make(name, net)
    attach(method, net)
    shake(method)
    with torch.no_grad():
        for _, p in trainable(net):
            p.add_(0.01)
    stored = save_adapter(net, tmp_path / "adapter.safetensors", {})
    assert stored < 60_000  # and no code in it
    attach(make(name, other), other)
    load_adapter(other, tmp_path / "adapter.safetensors")
    assert torch.equal(net(tokens).logits, other(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_check_leaves_the_quantised_backbone_as_it_was(dtype, net, tokens):
    net, _ = quantized(net.to(dtype))
    before = deepcopy(net.state_dict())
    with torch.no_grad():
        logits = net(tokens).logits
    method = make("dora", net)
    method.attach(net)
    shake(method)
    checked = merge_check(net, batch_of(tokens))
    assert checked and checked["ok"] and checked["max_abs_logit_diff"] > 0
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in after)
    with torch.no_grad():
        assert torch.equal(net(tokens).logits, logits)


@pytest.mark.parametrize("name", ["full", "top_layers"])
def test_a_quantised_tensor_cannot_be_trained(name, net, tokens):
    net, _ = quantized(net)
    logits = net(tokens).logits
    changes = {"k": 1} if name == "top_layers" else {}
    with pytest.raises(
        InputError, match=r"^model\.quantize=nf4: null, because \w+ trains \S+\.weight itself$"
    ):
        make(name, net, **changes).attach(net)
    attach(make("lora", net), net)
    assert torch.allclose(net(tokens).logits, logits)


def test_norms_can_be_trained_beside_quantised_layers(net, tokens):
    net, _ = quantized(net)
    make("layernorm", net).attach(net)
    loss_of(net, tokens).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in trainable(net))


# The run.


def model(folder, **changes):
    keys = ("revision", "sha256", "kinds", "quantize")
    words = {"device": "cpu", "dtype": "auto", "attention": "auto"}
    given = {"name": "hub", "source": "hub", "path": str(folder)}
    return {**dict.fromkeys(keys), **words, **given, **changes}


def load(folder, **changes):
    return load_backbone(model(folder, **changes), precision="fp32", block_length=64)


def test_all_sites_are_quantised_and_nothing_else(net, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    name = net.config.model_type
    if name == "gpt2":  # from a file, GPT-2 has Conv1D
        net = type(net)(net.config)
    net.save_pretrained(tmp_path / "model")
    plain, coded = load(tmp_path / "model"), load(tmp_path / "model", quantize="nf4")
    wanted = {site.name for site in find_sites(plain.net, FAMILIES[name], "all")}
    layers = {n: m for n, m in coded.net.named_modules() if isinstance(m, NF4Linear)}
    assert set(layers) == wanted
    assert coded.total_params == plain.total_params and coded.linear_logits
    for site, layer in layers.items():
        W = plain.net.get_parameter(f"{site}.weight")
        assert torch.equal(layer.weight, unpack(pack(W), tuple(W.shape), torch.float32))
    head, other = (b.net.get_output_embeddings() for b in (coded, plain))
    assert isinstance(head, nn.Linear) and isinstance(other, nn.Linear)
    assert torch.equal(head.weight, other.weight)
    kind, end = next(iter(FAMILIES[name].items()))
    part = load(tmp_path / "model", quantize="nf4", kinds={kind: end})
    assert {n for n, m in part.net.named_modules() if isinstance(m, NF4Linear)} == {
        n for n in wanted if n.endswith(end)
    }


@pytest.mark.parametrize("value", ["int4", True, 4])
def test_a_bad_value_is_one_line(value, tmp_path):
    with pytest.raises(InputError) as caught:
        load(tmp_path, quantize=value)
    assert str(caught.value) == f"model.quantize={value}: null or nf4"


def test_a_run_and_the_loss_of_its_base(compose, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    wanted = ("method=lora", "epochs=1")
    result = run(
        compose(*wanted, "model.quantize=nf4"), tmp_path / "run", trial=None, job_type="train"
    )
    assert result["status"] == "completed" and result["merge"]["ok"]
    assert result["final"]["train_bits_per_token"] < result["base"]["train_bits_per_token"]
    plain = assemble(compose(*wanted))
    assert plain.backbone.total_params == result["model"]["total_params"]
    found = plain.base[0].bits_per_token
    assert found != result["base"]["train_bits_per_token"]
    # a coded weight is close: the loss moves by a few percent, not to that of chance
    assert abs(found / result["base"]["train_bits_per_token"] - 1) < 0.1


@pytest.mark.skipif(
    not torch.cuda.is_available() or bitsandbytes() is None, reason="needs CUDA and bitsandbytes"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_on_a_gpu_equals_ours(dtype):
    for shape in SHAPES:
        packed = pack(random(*shape))
        on_gpu = type(packed)(*(tensor.cuda() for tensor in packed))
        found = unpack(on_gpu, shape, dtype)
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), unpack(packed, shape, dtype), rtol=1e-6, atol=0)

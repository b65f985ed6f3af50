from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import attach, make, shake, tiny_gpt2, tiny_llama
from peft import PrefixTuningConfig, get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from peftlab.checkpoint import adapter_tensors, load_adapter, save_adapter
from peftlab.errors import InputError

PEFT = "ignore:`is_gradient_checkpointing` is deprecated"


def tiny_llama_without_groups():
    """As many key heads as heads: peft's E is as wide as all keys."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def hf_peft(net, **settings):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings)
    torch.manual_seed(5)
    return get_peft_model(deepcopy(net), config).eval()


def unshifted(net, keys):
    """Rotate keys [P, H_kv * 4] back by 3 positions: peft moves the tokens on by as many."""
    cos, sin = net.model.rotary_emb(keys, torch.tensor([[-3]]))
    x = keys.unflatten(-1, (-1, 4))
    turned = torch.cat([-x[..., 2:], x[..., :2]], dim=-1)
    return (x * cos[0, 0] + turned * sin[0, 0]).flatten(-2)


def loss_of(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.filterwarnings(PEFT)
def test_without_the_mlp_it_is_that_of_peft_on_llama(tokens, expect_close):
    net = tiny_llama()
    base = net(tokens).logits
    theirs = hf_peft(net)
    given: Any
    (given,) = (p for p in theirs.parameters() if p.requires_grad)  # [3, layers * 2 * 8]
    method = make("prefix_tuning", net, hidden=None, length=3)
    method.attach(net)
    with torch.no_grad():
        for i, t in enumerate(method.tensors):
            t.K.copy_(unshifted(net, given[:, 16 * i : 16 * i + 8]))
            t.V.copy_(given[:, 16 * i + 8 : 16 * i + 16])
    logits = net(tokens, use_cache=False).logits
    assert (logits - base).abs().max() > 0.1
    expect_close(logits, theirs(input_ids=tokens).logits)
    loss_of(logits, tokens).backward()
    theirs(input_ids=tokens, labels=tokens).loss.backward()
    assert given.grad.abs().max() > 1e-2
    for i, t in enumerate(method.tensors):
        expect_close(t.K.grad, unshifted(net, given.grad[:, 16 * i : 16 * i + 8]))
        expect_close(t.V.grad, given.grad[:, 16 * i + 8 : 16 * i + 16])


@pytest.mark.filterwarnings(PEFT)
def test_with_the_mlp_it_is_that_of_peft_on_llama(tokens, expect_close):
    net = tiny_llama_without_groups()
    theirs = hf_peft(net, prefix_projection=True, encoder_hidden_size=5)
    given = {n.split("default.")[1]: p for n, p in theirs.named_parameters() if p.requires_grad}
    method = make("prefix_tuning", net, length=3, hidden=5)
    method.attach(net)
    with torch.no_grad():
        for i, t in enumerate(method.tensors):
            t.K0.zero_()
            t.V0.zero_()
            t.E.copy_(given["embedding.weight"])
            t.D.copy_(given["transform.0.weight"])
            t.b.copy_(given["transform.0.bias"])
            U, c = (given[f"transform.2.{n}"][32 * i : 32 * i + 32] for n in ("weight", "bias"))
            t.U.copy_(torch.cat([unshifted(net, U[:16].T).T, U[16:]]))
            t.c.copy_(torch.cat([unshifted(net, c[None, :16])[0], c[16:]]))
    logits = net(tokens, use_cache=False).logits
    expect_close(logits, theirs(input_ids=tokens).logits)
    loss_of(logits, tokens).backward()
    theirs(input_ids=tokens, labels=tokens).loss.backward()
    t = method.tensors[0]
    assert t.E.grad.abs().max() > 1e-4
    expect_close(t.E.grad, given["embedding.weight"].grad)
    expect_close(t.D.grad, given["transform.0.weight"].grad)


def cache_of(net, method) -> Any:
    """The slots as entries of a cache."""
    heads = getattr(net.config, "num_key_value_heads", 4)
    cache = DynamicCache()
    for i, t in enumerate(method.tensors):
        K, V = (x.detach().view(1, len(x), heads, 4).transpose(1, 2) for x in method.kv(t))
        cache.update(K, V, i)
    return cache


@pytest.mark.parametrize("hidden", [None, 5])
def test_it_starts_at_what_the_model_makes_of_tokens(hidden, net, tokens, expect_close):
    """The first step computes what the model itself does after the drawn tokens."""
    method = make("prefix_tuning", net, hidden=hidden, length=4)
    other = deepcopy(net).requires_grad_(False)
    method.attach(net)
    ids = torch.randperm(11, generator=torch.Generator().manual_seed(3))[:4]  # make's seed is 3
    read: Any = other(ids[None], use_cache=True).past_key_values
    for own, theirs in zip(cache_of(net, method).layers, read.layers, strict=True):
        expect_close(own.keys, theirs.keys)
        expect_close(own.values, theirs.values)
    positions = torch.arange(7)[None]
    for row in tokens:
        expected = other(
            row[None], past_key_values=deepcopy(read), position_ids=positions, use_cache=True
        ).logits
        expect_close(net(row[None]).logits, expected)


def test_it_starts_once(net):
    method = make("prefix_tuning", net, hidden=None)
    method.attach(net)
    shake(method)
    trained = [[x.clone() for x in method.kv(t)] for t in method.tensors]
    method.detach(net)
    method.attach(net)
    for pair, t in zip(trained, method.tensors, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(pair, method.kv(t), strict=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_kept_is_what_the_mlp_made(bf16, net, tokens, tmp_path):
    if bf16:
        net.bfloat16()
    other = deepcopy(net)
    method = make("prefix_tuning", net)
    attach(method, net)
    shake(method)

    def logits(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(tokens, use_cache=False).logits

    adapted = logits(net)
    made = []
    for t in method.tensors:  # by hand
        both = torch.tanh(t.E @ t.D.T + t.b) @ t.U.T + t.c
        width = both.shape[1] // 2
        made.append((t.K0 + both[:, :width], t.V0 + both[:, width:]))
    path = tmp_path / "adapter.safetensors"
    n_bytes = save_adapter(net, path, {})
    kept = adapter_tensors(net)
    d_kv = method.sites[0].d_kv
    assert sorted({n.split(".")[1] for n in kept}) == ["K", "V"]
    assert [tuple(x.shape) for x in kept.values()] == [(3, d_kv)] * 6
    assert 3 * 6 * d_kv * 4 < n_bytes < 3 * 6 * d_kv * 4 + 2000
    for (K, V), t in zip(made, method.tensors, strict=True):
        torch.testing.assert_close(t.K, K, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(t.V, V, atol=1e-6, rtol=1e-6)
    assert torch.equal(logits(net), adapted)
    method.compact()
    assert adapter_tensors(net).keys() == kept.keys()
    for hidden in (5, None):
        twin = deepcopy(other)
        make("prefix_tuning", twin, hidden=hidden).attach(twin)
        load_adapter(twin, path)
        assert torch.equal(logits(twin), adapted)


def test_counts_on_llama_8b():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=4096,
        intermediate_size=64,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        net = LlamaForCausalLM(config)
        for hidden, count in (
            (None, 32 * 2 * 30 * 1024),
            (512, 30 * 4096 + 512 * 4096 + 512 + 32 * 2 * 1024 * 513),
        ):
            method = make("prefix_tuning", net, length=30, hidden=hidden)
            assert sum(p.numel() for p in method.parameters()) == count


def test_longer_than_the_model_is_refused():
    net = tiny_gpt2()
    with pytest.raises(InputError) as caught:
        make("prefix_tuning", net, length=65).attach(net)
    line = "method.length=65: at most 64 (the model has 64 positions)"
    assert str(caught.value) == line
    assert not hasattr(net, "peft") and net.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"length": 0}, "method.length=0: a whole number of at least 1"),
        ({"hidden": 0}, "method.hidden=0: a whole number of at least 1"),
        ({"std": 0}, "method.std=0: a finite number above 0"),
        ({"sites": ["q", "o"]}, "method.sites=q: a prefix belongs to the kind o"),
    ],
)
def test_bad_input(changes, line):
    with pytest.raises(InputError) as caught:
        make("prefix_tuning", tiny_llama(), **changes)
    assert str(caught.value) == line

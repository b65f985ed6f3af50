from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import defaults, make, shake, tiny_gpt2, tiny_llama
from hydra.utils import get_class
from peft import IA3Config, get_peft_model
from test_peft_agreement import close, loss_of
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from peftlab.errors import InputError
from peftlab.method import trainable
from peftlab.sites import FAMILIES, find_sites

# peft 0.21 asks transformers 5.23 by a name that is going away
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

HEADS, HEAD, WIDTH = 4, 4, 16


def tiny_neox():
    torch.manual_seed(6)
    sizes: dict[str, Any] = dict(
        vocab_size=11,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        initializer_range=0.3,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    net = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).eval().requires_grad_(False)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    return net


NETS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "gpt_neox": tiny_neox}
FUSED_ROWS = {  # by hand: 16 rows each of q, k, v; GPT-NeoX: 4 each within each of 4 heads
    "gpt2": {"q": [*range(16)], "k": [*range(16, 32)], "v": [*range(32, 48)]},
    "gpt_neox": {
        "q": [0, 1, 2, 3, 12, 13, 14, 15, 24, 25, 26, 27, 36, 37, 38, 39],
        "k": [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31, 40, 41, 42, 43],
        "v": [8, 9, 10, 11, 20, 21, 22, 23, 32, 33, 34, 35, 44, 45, 46, 47],
    },
}


@pytest.fixture(params=NETS)
def family(request):
    return request.param


def rows_of(site):
    return list(range(site.d_out)) if site.rows is None else list(site.rows)


def test_outputs_and_gradients_are_pefts(family, tokens):
    net = NETS[family]()
    ends = FAMILIES[family]
    down = ends["down"]
    names = [ends[kind] for kind in (("k", "v") if family == "llama" else ("qkv",))] + [down]
    # peft's vector has entries for q too: they stay 1
    config = IA3Config(target_modules=names, feedforward_modules=[down])
    theirs: Any = get_peft_model(deepcopy(net), config).eval()
    base = net(tokens).logits
    method = make("ia3", net)
    method.attach(net)
    close(theirs(input_ids=tokens).logits, net(tokens).logits)
    shake(method, std=0.3)
    pairs = []
    for site, t in zip(method.sites, method.tensors, strict=True):
        vector = theirs.base_model.model.get_submodule(site.name).ia3_l["default"]
        where = list(range(site.d_in)) if site.kind == "down" else rows_of(site)
        vector.data.view(-1)[where] = t.l.detach()
        pairs.append((t.l, vector, where))
    assert len(pairs) == sum(p.requires_grad for p in theirs.parameters())
    logits = net(tokens).logits
    assert (logits - base).abs().max() > 1e-2
    close(theirs(input_ids=tokens).logits, logits)
    loss_of(net, tokens).backward()
    loss_of(theirs, tokens).backward()
    for ours, vector, where in pairs:
        assert ours.grad.abs().max() > 1e-5
        close(ours.grad, vector.grad.view(-1)[where])


def test_only_what_attention_takes_as_keys_and_values_is_scaled(family, tokens):
    """Seen from outside: with l = 0 for v, attention gives nothing; with l = 0 for k, the mean."""
    net = NETS[family]()
    for kind in ("k", "v"):
        method = make("ia3", net, sites=[kind])
        method.attach(net)
        with torch.no_grad():
            for p in method.parameters():
                p.zero_()
        inputs = []
        o = next(m for n, m in net.named_modules() if n.endswith(FAMILIES[family]["o"]))
        handle = o.register_forward_pre_hook(lambda module, args, kept=inputs: kept.append(args[0]))
        attentions = net(tokens, output_attentions=True).attentions
        handle.remove()
        method.detach(net)
        n = tokens.shape[1]
        uniform = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
        for weights in attentions:
            is_uniform = (weights - uniform).abs().max() < 1e-6
            assert is_uniform == (kind == "k")
        assert inputs[0].any() == (kind == "k")


def test_merged_is_adapted_bias_included(family, tokens, expect_close):
    net = NETS[family]()
    before = {n: p.clone() for n, p in net.named_parameters()}
    method = make("ia3", net)
    method.attach(net)
    shake(method, std=0.3)
    adapted = net(tokens).logits
    sites, factors = method.sites, [t.l.detach().clone() for t in method.tensors]
    method.merge(net)
    expect_close(net(tokens).logits, adapted)
    for site, l_site in zip(sites, factors, strict=True):
        W, b = before[f"{site.name}.weight"], before.get(f"{site.name}.bias")
        if site.kind == "down":
            torch.testing.assert_close(site.module.weight, W * l_site)
            assert b is None or torch.equal(site.module.bias, b)
            continue
        scale = torch.ones(site.d_out)
        scale[rows_of(site)] = l_site
        torch.testing.assert_close(site.module.weight, W * scale[:, None])
        others = sorted(set(range(site.d_out)) - set(rows_of(site)))
        assert torch.equal(site.module.weight[others], W[others])
        if b is not None:
            torch.testing.assert_close(site.module.bias, b * scale)


def test_count():
    """2 * kv + f a layer, by hand."""
    for name, layers, expected in (
        ("llama", 3, 8 + 8 + 24),
        ("gpt2", 3, 16 + 16 + 64),
        ("gpt_neox", 2, 16 + 16 + 24),
    ):
        net = NETS[name]()
        make("ia3", net).attach(net)
        assert sum(p.numel() for _, p in trainable(net)) == layers * expected


def test_bf16_keeps_a_small_change():
    """In bf16 1.001 is 1; the change 0.001 of a large and of a small output must not be lost."""
    method = make("ia3", tiny_llama().bfloat16(), sites=["v", "down"])
    for site, t in list(zip(method.sites, method.tensors, strict=True))[:2]:
        with torch.no_grad():
            t.l.fill_(1.001)
        x = torch.randn(64, site.d_in, dtype=torch.bfloat16)
        zero = torch.zeros(64, site.d_out, dtype=torch.bfloat16)
        y = site.module(x)
        change = method(t, site.module, x, zero if site.kind == "down" else y)
        if site.kind == "down":
            torch.testing.assert_close(change, 0.001 * y, atol=2e-5, rtol=2e-2)
        else:
            grad = torch.autograd.grad(change.sum(), t.l)[0]
            torch.testing.assert_close(grad, y.float().sum(0), atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize("fused", FUSED_ROWS)
def test_rows_of_a_fused_layer(fused):
    net, kinds, rows = NETS[fused](), FAMILIES[fused], FUSED_ROWS[fused]
    for wanted, kind in (
        (["q"], "q"),
        (["v"], "v"),
        ("k", "k"),
        (["v", "k"], "k+v"),
        (["v", "q", "q"], "q+v"),
    ):
        sites = find_sites(net, kinds, wanted)
        expected = tuple(sorted(row for part in set(wanted) for row in rows[part]))
        assert {(s.kind, s.rows, s.n_rows) for s in sites} == {(kind, expected, len(expected))}
        assert len(sites) == net.config.num_hidden_layers
        assert all(s.name.endswith(kinds["qkv"]) and s.d_out == 48 for s in sites)
    both = find_sites(net, kinds, ["down", "v"])
    assert [(s.kind, s.rows) for s in both[:2]] == [("v", tuple(rows["v"])), ("down", None)]
    for wanted in ("qkv", ["k", "q", "v"]):
        assert {(s.kind, s.rows, s.n_rows) for s in find_sites(net, kinds, wanted)} == {
            ("qkv", None, 48)
        }
    assert all(site.rows is None for site in find_sites(net, kinds, "all"))


def test_parts_that_are_none():
    for wanted, named in ((["qkv", "k"], "k"), (["gate"], "gate"), (["k", "gate"], "gate")):
        with pytest.raises(InputError, match=rf"method\.sites={named}: this model has the kinds"):
            find_sites(tiny_gpt2(), FAMILIES["gpt2"], wanted)
    kinds = {"qkv": "self_attn.q_proj"}  # a layout that is not known
    with pytest.raises(InputError, match=r"method\.sites=k: this model has the kinds qkv"):
        find_sites(tiny_llama(), kinds, ["k"])
    assert find_sites(tiny_llama(), FAMILIES["llama"], ["k"])[0].rows is None


def test_only_methods_that_keep_to_rows_take_them(name):
    net = tiny_gpt2()
    if get_class(defaults(name)["_target_"]).parts:
        assert make(name, net, sites=["q"]).sites[0].rows == tuple(range(16))
        return
    with pytest.raises(InputError, match=r"method\.sites=(q|q\+v): .*qkv"):
        make(name, net, sites=["q", "v"])

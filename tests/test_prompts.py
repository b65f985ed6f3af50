"""The two seams that add positions, on every family; their oracles are peft and the plain cache."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import VOCABULARY, attach, tiny_gpt2, tiny_llama
from torch import nn
from transformers import DynamicCache

from peftlab.backbone import conv1d_to_linear
from peftlab.data import Batch
from peftlab.errors import InputError
from peftlab.fit import nats_of
from peftlab.method import SiteMethod
from peftlab.prompts import Prefix, PrefixMethod, PromptMethod, attend, attend_fused
from peftlab.sites import FAMILIES, find_sites
from peftlab.stack import Stack

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    ffn_dim=24,
    word_embed_proj_dim=16,
    max_position_embeddings=64,
    initializer_range=0.3,
    init_std=0.3,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    dropout=0.0,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
    query_pre_attn_scalar=5,
    sliding_window=32,
    rope_parameters=None,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
KINDS = {
    "Llama": "LlamaForCausalLM",
    "Gemma2": "Gemma2ForCausalLM",  # caps scores softly, windows, scaled embeddings
    "Gemma3Text": "Gemma3ForCausalLM",  # windows, normed queries, scaled embeddings
    "Qwen3": "Qwen3ForCausalLM",
    "GPT2": "GPT2LMHeadModel",
    "GPTNeoX": "GPTNeoXForCausalLM",
    "OPT": "OPTForCausalLM",
}
# transformers has no sdpa for Gemma 2, whose scores are capped
EVERY = [(k, a) for k in KINDS for a in ("eager", "sdpa") if (k, a) != ("Gemma2", "sdpa")]


def tiny(kind: str, attention: str = "eager", **changes: object) -> Any:
    config_class = getattr(transformers, f"{kind}Config")
    known = set(config_class().to_dict()) | {"hidden_size", "num_hidden_layers"}
    known |= {"num_attention_heads", "max_position_embeddings"}
    sizes = {k: v for k, v in (SIZES | changes).items() if k in known and k != "rope_parameters"}
    torch.manual_seed(6)
    net = getattr(transformers, KINDS[kind])(config_class(**sizes, attn_implementation=attention))
    conv1d_to_linear(net)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.3)
    return net.eval().requires_grad_(False)


def o_sites(net: Any):
    return find_sites(net, FAMILIES[net.config.model_type], ["o"])


class Slots(PrefixMethod):
    """Random K and V, and a gate if it is given one."""

    def __init__(self, net, length=5, gate=None, std=1.0):
        super().__init__(o_sites(net))
        torch.manual_seed(7)
        self.own("K", lambda s: torch.randn(length, s.d_kv) * std)
        self.own("V", lambda s: torch.randn(length, s.d_kv) * std)
        self.given = gate

    def kv(self, t):
        return t.K, t.V

    def gate(self, t, x):
        return None if self.given is None else self.given(x)


class Words(PromptMethod):
    """Random embeddings."""

    def __init__(self, net, length=4):
        super().__init__(o_sites(net), length=length)
        torch.manual_seed(8)
        self.P = nn.Parameter(torch.randn(length, net.config.hidden_size))

    def extend(self, e):
        return torch.cat([self.P.to(e.dtype).expand(len(e), -1, -1), e], dim=1)


def by_cache(net: Any, method: Slots, tokens: torch.Tensor) -> torch.Tensor:
    """The bare model with the slots in its cache, and the tokens at the positions 0, 1, ..."""
    width = getattr(net.config, "head_dim", None) or 16 // 4
    cache = DynamicCache()
    for i, t in enumerate(method.tensors):
        K, V = (
            x.detach().unflatten(-1, (-1, width)).transpose(0, 1).expand(len(tokens), -1, -1, -1)
            for x in (t.K, t.V)
        )
        cache.update(K, V, i)
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    return net(tokens, past_key_values=cache, position_ids=positions).logits


@pytest.mark.parametrize(("kind", "attention"), EVERY)
def test_slots_are_entries_of_the_cache_that_take_no_position(
    kind, attention, tokens, expect_close
):
    net = tiny(kind)
    method = Slots(net)
    base, expected = net(tokens).logits, by_cache(net, method, tokens)
    net.set_attn_implementation(attention)
    method.attach(net)
    logits = net(tokens, use_cache=False).logits
    assert (logits - base).abs().max() > 0.1
    expect_close(logits, expected, atol=2e-5)
    fused = "_fused" if attention == "sdpa" else ""
    assert net.config._attn_implementation == f"peftlab_attend{fused}"
    method.detach(net)
    assert net.config._attn_implementation == attention
    expect_close(net(tokens).logits, base, atol=2e-5)


@pytest.mark.parametrize(("kind", "attention"), EVERY)
def test_without_slots_it_is_the_backbone(kind, attention, tokens, expect_close):
    net = tiny(kind, attention, sliding_window=3)
    base = net(tokens).logits
    Slots(net, length=0).attach(net)
    expect_close(net(tokens).logits, base)


def test_a_window_hides_far_tokens_but_no_slot():
    net = tiny("Gemma3Text", num_hidden_layers=1, layer_types=["sliding_attention"])
    net.config.sliding_window = 3
    net.model.layers[0].self_attn.sliding_window = 3
    tokens = torch.arange(9)[None]
    method = Slots(net)
    method.attach(net)
    last = net(tokens).logits[:, -1]
    tokens[0, 5] = 10
    assert torch.equal(net(tokens).logits[:, -1], last)  # three back from the last
    tokens[0, 6] = 10
    assert not torch.equal(net(tokens).logits[:, -1], last)
    (t,) = method.tensors
    for slot in range(5):
        before = net(tokens).logits[:, -1]
        with torch.no_grad():
            t.V[slot] += 1
        assert (net(tokens).logits[:, -1] - before).abs().max() > 1e-4


@pytest.mark.parametrize("function", [attend, attend_fused])
def test_each_head_mixes_attention_to_tokens_and_to_slots(function):
    """He et al. 2021, eq. 7: (1 - λ) attention to the tokens + λ attention to the slots."""
    torch.manual_seed(9)
    B, H, H_kv, T, h, P = 2, 6, 3, 4, 5, 7
    q = torch.randn(B, H, T, h, dtype=torch.float64)
    k, v = torch.randn(2, B, H_kv, T, h, dtype=torch.float64)
    K, V = torch.randn(2, P, H_kv * h, dtype=torch.float64)
    mask = torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    module = nn.Module().eval()
    output, _ = function(module, q, k, v, mask, prefix=Prefix(K, V, None))
    for b in range(B):
        for head in range(H):
            group = head // (H // H_kv)
            K_h, V_h = (x[:, group * h : (group + 1) * h] for x in (K, V))
            for i in range(T):
                to_slots = torch.exp(K_h @ q[b, head, i] / h**0.5)
                to_tokens = torch.exp(k[b, group, : i + 1] @ q[b, head, i] / h**0.5)
                share = to_slots.sum() / (to_slots.sum() + to_tokens.sum())
                mixed = (1 - share) * (to_tokens / to_tokens.sum()) @ v[b, group, : i + 1]
                mixed += share * (to_slots / to_slots.sum()) @ V_h
                torch.testing.assert_close(
                    output[b, i, head], mixed, atol=1e-6, rtol=0
                )  # softmax is float32


def test_both_functions_agree_with_a_gate_and_in_their_gradients(expect_close):
    torch.manual_seed(10)
    B, H, H_kv, T, h, P = 2, 4, 2, 6, 4, 3
    leaves = [
        torch.randn(shape, requires_grad=True)
        for shape in (
            *((B, H, T, h), (B, H_kv, T, h), (B, H_kv, T, h)),
            *((P, H_kv * h), (P, H_kv * h), (B, T)),
        )
    ]
    q, k, v, K, V, g = leaves
    mask = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)[None, None]
    results = []
    for function in (attend, attend_fused):
        y, _ = function(nn.Module(), q, k, v, mask, scaling=0.7, prefix=Prefix(K, V, g))
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    assert all(x.abs().max() > 1e-3 for x in results[0])
    for one, other in zip(*results, strict=True):
        expect_close(other, one)
    # by hand, one token of one head: the token sees g K and g V
    b, head, i = 1, 2, 4
    gate = g[b, i]
    keys = torch.cat([gate * K[:, h : 2 * h], k[b, 1, : i + 1]])  # head 2 is of the second group
    values = torch.cat([gate * V[:, h : 2 * h], v[b, 1, : i + 1]])
    by_hand = F.softmax(0.7 * keys @ q[b, head, i], dim=0) @ values
    expect_close(results[0][0][b, i, head], by_hand)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_gate_of_one_is_none_and_a_constant_one_scales_the_slots(
    attention, net, tokens, expect_close
):
    net.set_attn_implementation(attention)

    def logits(method):
        method.attach(net)
        result = net(tokens).logits
        method.detach(net)
        return result

    plain = logits(Slots(net))
    expect_close(logits(Slots(net, gate=lambda x: x.new_ones(x.shape[:2]))), plain)
    halved = logits(Slots(net, gate=lambda x: x.new_full(x.shape[:2], 0.5)))
    assert (halved - plain).abs().max() > 0.1
    expect_close(halved, logits(Slots(net, std=0.5)))


def test_a_gate_per_token_lets_no_token_see_ahead(net, tokens):
    method = Slots(net, gate=lambda x: torch.sigmoid(x.sum(-1)))
    method.attach(net)
    logits = net(tokens).logits
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCABULARY
    others = net(changed).logits
    assert torch.equal(others[:, :4], logits[:, :4])
    assert (others[:, 4:] - logits[:, 4:]).abs().amax((0, 2)).min() > 1e-3


def packed(tokens):
    """Rows of three and four tokens joined."""
    positions = torch.cat([torch.arange(3), torch.arange(4)]).expand(len(tokens), -1)
    return Batch(tokens, tokens, positions, tokens.numel())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_see_the_slots_and_not_each_other(attention, net, tokens, expect_close):
    net.set_attn_implementation(attention)
    attach(Slots(net), net)
    batch = packed(tokens)
    joined = net(batch.ids, position_ids=batch.positions, use_cache=False).logits
    apart = [net(part, use_cache=False).logits for part in tokens.split([3, 4], dim=1)]
    expect_close(joined, torch.cat(apart, dim=1))


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("Llama", "sdpa"),
        ("GPT2", "eager"),
        ("OPT", "sdpa"),
        ("Gemma2", "eager"),
        ("Gemma3Text", "sdpa"),
    ],
)
@pytest.mark.parametrize("make", [Slots, Words])
def test_generation_with_a_cache_and_without_and_padded_is_the_same(make, kind, attention, tokens):
    net = tiny(kind, attention, sliding_window=4)
    method = make(net)
    method.attach(net)
    ids = tokens
    for _ in range(6):
        step = net(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, step], dim=1)
    how: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    ones = torch.ones_like(tokens)
    for use_cache in (True, False):
        found = net.generate(tokens, attention_mask=ones, use_cache=use_cache, **how)
        assert torch.equal(found, ids)
    if make is Words and net.config.model_type.startswith("gemma"):
        return  # windows: padding comes between the prompt and the tokens
    pads, zeros = tokens.new_zeros(3, 2), ones.new_zeros(3, 2)
    left, mask = torch.cat([pads, tokens], dim=1), torch.cat([zeros, ones], dim=1)
    found = net.generate(left, attention_mask=mask, **how)
    assert torch.equal(found[:, 2:], ids)


@pytest.mark.parametrize("make", [Slots, Words])
def test_bf16_is_close_and_trains_float32(make, tokens):
    for net in (tiny_llama(), tiny_gpt2()):
        exact = make(net)
        exact.attach(net)
        expected = net(tokens).logits
        exact.detach(net)
        net.bfloat16()
        for attention in ("eager", "sdpa"):
            net.set_attn_implementation(attention)
            method = make(net)
            method.attach(net)
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(tokens, use_cache=False).logits
            assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
            logits.float().sin().sum().backward()
            for p in method.parameters():
                assert p.dtype == p.grad.dtype == torch.float32 and p.grad.abs().max() > 0
            method.detach(net)


@torch.no_grad()
def test_it_stacks_with_changes_of_linear_layers(net, tokens, expect_close):
    class Half(SiteMethod):
        def forward(self, t, site, x, y):
            return 0.5 * y

    def scale_outputs(factor):
        for site in o_sites(net):
            for p in site.module.parameters():
                p.mul_(factor)

    prefix = Slots(net)
    scale_outputs(0.5)
    prefix.attach(net)
    expected = net(tokens).logits
    prefix.detach(net)
    scale_outputs(2)
    stack = Stack(o_sites(net), [prefix, Half(o_sites(net))])
    stack.attach(net)
    expect_close(net(tokens).logits, expected)
    stack.detach(net)
    assert net.config._attn_implementation == "eager"


def test_a_prefix_belongs_to_the_attentions_output():
    net = tiny_llama()
    sites = find_sites(net, FAMILIES["llama"], ["q"])
    with pytest.raises(InputError) as caught:
        PrefixMethod(sites)
    assert str(caught.value) == "method.sites=q: a prefix belongs to the kind o"


def test_a_model_whose_attention_cannot_be_exchanged_is_refused(monkeypatch):
    net: Any = tiny_llama()
    # what transformers itself remembers of a class without attention functions
    monkeypatch.setattr(type(net), "_can_set_attn_implementation_cached_value", False)
    line = "model=LlamaForCausalLM: for a prefix one whose attention can be exchanged"
    with pytest.raises(InputError) as caught:
        Slots(net).attach(net)
    assert str(caught.value) == line
    monkeypatch.undo()
    net.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(InputError) as caught:
        Slots(net).attach(net)
    assert str(caught.value) == line and net.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_embeddings_before_those_of_the_tokens(kind, tokens, expect_close):
    net = tiny(kind)
    method = Words(net)
    base = net(tokens).logits
    e = net.get_input_embeddings()(tokens)
    longer = torch.cat([method.P.detach().expand(3, -1, -1), e], dim=1)
    expected = net(inputs_embeds=longer).logits[:, 4:]
    method.attach(net)
    logits = net(tokens).logits
    assert (logits - base).abs().max() > 0.1
    expect_close(logits, expected)
    expect_close(net(inputs_embeds=e).logits, expected)
    assert net.base_model(tokens).last_hidden_state.shape == e.shape
    method.detach(net)
    assert torch.equal(net(tokens).logits, base)


def test_padding_on_the_left_does_not_count(net, tokens, expect_close):
    Words(net).attach(net)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]] * 3)
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4]] * 3)
    padded = net(tokens, attention_mask=mask, position_ids=positions).logits
    expect_close(padded[:, 2:], net(tokens[:, 2:]).logits)


def test_a_prompt_refuses_packed_rows_and_rows_too_long(net, tokens):
    method = Words(net)
    method.attach(net)

    def refused(call):
        with pytest.raises(InputError) as caught:
            call()
        return str(caught.value)

    def nats(batch):
        return nats_of(net, batch)

    line = "dataset.packing=true: false for a method that puts a prompt before each row"
    assert refused(lambda: method.prepare(nats, [packed(tokens)])) == line
    rows = torch.zeros(1, 61, dtype=torch.int64)
    line = "method.length=4: at most 3 (the model has 64 positions, the longest row takes 61)"
    assert refused(lambda: method.prepare(nats, [Batch(rows, rows, None, 61)])) == line
    assert refused(lambda: net(rows)) == line
    assert net(rows[:, 1:]).logits.shape == (1, 60, VOCABULARY)

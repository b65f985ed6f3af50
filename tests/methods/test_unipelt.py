from copy import deepcopy

import pytest
import torch
from conftest import NETS, VOCABULARY, make, shake, tiny_llama

from peftlab.errors import InputError
from peftlab.method import trainable
from peftlab.stack import Stack


def shaken(net, **changes):
    method = make("unipelt", net, **changes)
    method.attach(net)
    shake(method, std=0.2)
    return method


def set_gates(method, opening):
    """Give all gates of all tokens one value."""
    with torch.no_grad():
        for member in method.members:
            for t in member.tensors:
                t.w_g.zero_()
                t.b_g.copy_(torch.logit(torch.tensor([opening])))


def plain_sum(net, method, factor):
    """Prefix tuning, Pfeiffer's adapter and LoRA with the tensors of `method`, without gates.

    The outputs of all three are multiplied by `factor`, for the prefix K and V.
    """
    prefix = make("prefix_tuning", net)
    prefix.started = True  # its K0 and V0 are those of `method`
    adapter = make("pfeiffer", net)
    fused = net.config.model_type == "gpt2"
    lora = make("lora", net, sites=["qkv"] if fused else ["q", "v"], alpha=4.0)  # = rank
    with torch.no_grad():
        for plain, gated in zip((prefix, adapter, lora), method.members, strict=True):
            for t, given in zip(plain.tensors, gated.tensors, strict=True):
                for name, p in vars(t).items():
                    value = getattr(given, name)
                    # what makes K and V, and both changes
                    if name in ("K0", "V0", "U", "c", "b_U", "B"):
                        value = factor * value
                    if name == "B" and fused:  # rows 16..31 are those of k
                        p[:16], p[32:] = value[:16], value[16:]
                    else:
                        p.copy_(value)
    return Stack([], [prefix, adapter, lora])


@pytest.mark.parametrize("opening", [1.0, 0.5, 0.2, 0.0])
def test_with_constant_gates_it_is_the_sum_of_its_parts(net, tokens, opening, expect_close):
    other = deepcopy(net)
    base = net(tokens).logits
    method = shaken(net)
    free = net(tokens).logits
    set_gates(method, opening)
    logits = net(tokens).logits
    plain_sum(other, method, opening).attach(other)
    expect_close(logits, other(tokens).logits)
    # closed gates leave a prefix of zeros, which still takes its share of the softmax
    assert (logits - base).abs().max() > 1e-2 and (logits - free).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_later_token_changes_nothing_before_it(net, tokens, attention):
    net.set_attn_implementation(attention)
    shaken(net)
    logits = net(tokens).logits
    for last in range(tokens.shape[1] - 1):
        other = tokens.clone()
        other[:, last + 1 :] = (other[:, last + 1 :] + 1) % VOCABULARY
        changed = net(other).logits
        assert torch.equal(changed[:, : last + 1], logits[:, : last + 1])
        assert (changed[:, last + 1] - logits[:, last + 1]).abs().max() > 0.1


def test_lora_with_its_gate_by_hand(net, expect_close):
    method = shaken(net, sites=["q", "v"])
    (lora,) = method.members
    for site, t in zip(method.sites, lora.tensors, strict=True):
        x = torch.randn(2, 5, 16)
        g = 1 / (1 + torch.exp(-(x * t.w_g[0]).sum(-1, keepdim=True) - t.b_g))
        assert g.max() - g.min() > 0.2
        change = g * (x @ t.A.T @ t.B.T)
        expected = torch.nn.functional.linear(x, site.module.weight, site.module.bias)
        if site.d_out == 48:  # rows of q, k and v
            expected[..., :16] += change[..., :16]
            expected[..., 32:] += change[..., 16:]
        else:
            expected += change
        expect_close(site.module(x), expected)


@pytest.mark.parametrize("with_residual", [True, False])
def test_the_adapter_with_its_gate_by_hand(net, with_residual, expect_close):
    """Seen at the output of the first layer, which is the MLP's output plus the residual."""
    bare, x = deepcopy(net), torch.randn(2, 5, 16)
    method = shaken(net, sites=["down"], input_with_residual=with_residual)
    t = method.members[0].tensors[0]
    seen = {}
    for name, model in (("bare", bare), ("adapted", net)):
        llama = net.config.model_type == "llama"
        layer = model.model.layers[0] if llama else model.transformer.h[0]
        for part, module in (("layer", layer), ("mlp", layer.mlp)):
            module.register_forward_hook(lambda m, a, y, key=(name, part): seen.update({key: y}))
        model(inputs_embeds=x)
    z = seen["bare", "layer" if with_residual else "mlp"]
    g = 1 / (1 + torch.exp(-(z * t.w_g[0]).sum(-1, keepdim=True) - t.b_g))
    assert g.max() - g.min() > 0.2
    change = g * ((z @ t.D.T + t.b_D).clamp(min=0) @ t.U.T + t.b_U)
    assert change.abs().max() > 0.1
    expect_close(seen["adapted", "layer"], seen["bare", "layer"] + change)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_prefix_is_to_each_token_one_times_its_gate(kind, attention, tokens, expect_close):
    net = NETS[kind](1)
    net.set_attn_implementation(attention)
    other = deepcopy(net)
    method = shaken(net, sites=["o"])
    (t,) = method.members[0].tensors
    norm = net.model.layers[0].input_layernorm if kind == "llama" else net.transformer.h[0].ln_1
    entering = []
    norm.register_forward_hook(lambda module, args, x: entering.append(x))
    logits = net(tokens[:1]).logits
    g = 1 / (1 + torch.exp(-entering[0] @ t.w_g[0] - t.b_g))  # [1, T]
    assert g.max() - g.min() > 0.2
    plain = make("prefix_tuning", other, hidden=None)
    plain.attach(other)
    K, V = (torch.tanh(t.E @ t.D.T + t.b) @ t.U.T + t.c).chunk(2, dim=-1)
    K, V = t.K0 + K, t.V0 + V
    for position, opening in enumerate(g[0]):
        with torch.no_grad():
            plain.tensors[0].K.copy_(opening * K)
            plain.tensors[0].V.copy_(opening * V)
        expect_close(other(tokens[:1]).logits[:, position], logits[:, position])


def test_the_gates_start_half_open():
    net = tiny_llama()
    method = make("unipelt", net)
    x = torch.randn(50, 16)
    for member in method.members:
        for t in member.tensors:
            g = member.opening(t, x)
            assert 0 < (g - 0.5).abs().max() < 0.1 and not t.b_g.any()
    set_gates(method, 0.5)
    assert all((m.opening(t, x) == 0.5).all() for m in method.members for t in m.tensors)


def test_count():
    """By hand: length 3, hidden 5, bottleneck 3, rank 4, width 16, three layers."""
    for kind, d_kv, lora in (
        ("llama", 8, 4 * (16 + 16) + 17 + 4 * (16 + 8) + 17),
        ("gpt2", 16, 4 * (16 + 32) + 17),  # 32 rows of q and v
    ):
        net = NETS[kind]()
        make("unipelt", net).attach(net)
        prefix, adapter = 2 * d_kv * 6 + 17, 2 * 3 * 16 + 3 + 16 + 17
        expected = 3 * 16 + 5 * 17 + 3 * (prefix + adapter + lora)
        assert sum(p.numel() for _, p in trainable(net)) == expected


def test_gradients_reach_every_gate_after_one_step(net, tokens):
    method = make("unipelt", net)
    method.attach(net)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for reached in (1, 3):  # at first only the prefix does anything: B and U are 0
        optimizer.zero_grad()
        net(tokens).logits.logsumexp(-1).sum().backward()
        gates = [[t.w_g.grad.abs().max() > 0 for t in m.tensors] for m in method.members]
        assert [all(open_) for open_ in gates] == [True] * reached + [False] * (3 - reached)
        optimizer.step()


def test_compact_drops_the_mlp_of_the_prefix_only(net, tokens):
    method = shaken(net)
    expected = net(tokens).logits
    before = {name.split(".")[2] for name, _ in method.named_parameters()}
    for _ in range(2):
        method.compact()
        assert torch.equal(net(tokens).logits, expected)
    prefix = {name.split(".")[0] for name, _ in method.members[0].named_parameters()}
    assert prefix == {"K", "V", "w_g", "b_g"}
    after = {name.split(".")[2] for name, _ in method.named_parameters()}
    assert before - after == {"E", "b", "c"}  # D and U are also the adapter's


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_is_the_same_with_and_without_cache(net, tokens, attention, expect_close):
    net.set_attn_implementation(attention)
    shaken(net)
    greedy = tokens
    for _ in range(6):
        greedy = torch.cat([greedy, net(greedy, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    for use_cache in (True, False):
        out = net.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(out, greedy)
    cache = net(tokens[:, :4], use_cache=True).past_key_values
    rest = net(tokens[:, 4:], past_key_values=cache).logits
    expect_close(rest, net(tokens).logits[:, 4:])


def test_bf16(net, tokens):
    shaken(net)
    expected = net(tokens).logits
    for p in net.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(tokens).logits
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    logits.float().square().sum().backward()
    for _, p in trainable(net):
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any()


def test_what_is_not_named_is_left_out(tokens):
    for sites, expected in ((["o"], 1), (["q"], 1), (["down", "v"], 2), ("all", 3)):
        net = tiny_llama()
        method = shaken(net, sites=sites)
        assert len(method.members) == expected
        assert sum(len(m.tensors) for m in method.members) == len(method.sites)
        assert net(tokens).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rank": 9}, "method.rank=9: a whole number from 1 to 8 (the smaller side of "),
        ({"prefix_std": 0}, "method.prefix_std=0: a finite number above 0"),
        ({"std": -1}, "method.std=-1: a finite number above 0"),
        ({"hidden": 0}, "method.hidden=0: a whole number of at least 1"),
        ({"bottleneck": 1.5}, "method.bottleneck=1.5: a whole number of at least 1"),
    ],
)
def test_bad_input(changes, line):
    with pytest.raises(InputError) as caught:
        make("unipelt", tiny_llama(), **changes)
    assert str(caught.value).startswith(line)

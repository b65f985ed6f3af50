import math

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, make, shake, tiny_gpt2, tiny_llama
from transformers import OPTConfig, OPTForCausalLM

from peftlab.bits import linear_nll
from peftlab.data import Batch
from peftlab.errors import InputError
from peftlab.fit import nats_of
from peftlab.flops import FlopCounter
from peftlab.side import documents


def attached(net, **changes):
    method = make("ladder", net, **changes)
    method.attach(net)
    shake(method, 0.2)
    return method


def blocks_of(net):
    return net.model.layers if net.config.model_type == "llama" else net.transformer.h


def final_norm(net):
    return net.model.norm if net.config.model_type == "llama" else net.transformer.ln_f


def hiddens_of(net, tokens):
    """What the blocks give, read off without the method."""
    raw = []  # transformers itself gives the last one normalised only
    watch = final_norm(net).register_forward_pre_hook(lambda m, a: raw.append(a[0]))
    *outputs, _ = net(tokens, output_hidden_states=True, use_cache=False).hidden_states
    watch.remove()
    return [*outputs, *raw]


def norm_by_hand(z, gain):
    centred = z - z.mean(-1, keepdim=True)
    return gain * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def block_by_hand(block, z, w, heads):
    """One document, its attention written out: token by token, head by head."""
    n = norm_by_hand(z, block.norm_1.weight)
    q, k, v = (n @ part.T for part in block.qkv.weight.split(w))
    seen = torch.zeros_like(z)
    size = w // heads
    for t in range(len(z)):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = k[: t + 1, part] @ q[t, part] / math.sqrt(size)
            seen[t, part] = torch.softmax(scores, 0) @ v[: t + 1, part]
    z = z + seen @ block.o.weight.T
    inner = norm_by_hand(z, block.norm_2.weight) @ block.up.weight.T
    gelu = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    return z + gelu @ block.down.weight.T


def ladder_by_hand(method, hiddens, w, heads, temperature):
    z = hiddens[0] @ method.embed.weight.T + method.embed.bias
    for i, block in enumerate(method.blocks):
        g = 1 / (1 + math.exp(-method.alpha[i].item() / temperature))
        rung = hiddens[i + 1] @ method.rungs[i].weight.T + method.rungs[i].bias
        z = block_by_hand(block, g * z + (1 - g) * rung, w, heads)
    return norm_by_hand(z, method.norm.weight) @ method.U.weight.T + method.U.bias


@pytest.mark.parametrize("residual", [True, False])
def test_it_is_the_ladder_written_out(net, residual, tokens, expect_close):
    hiddens = hiddens_of(net, tokens)
    last = final_norm(net)(hiddens[-1])
    head = net.get_output_embeddings().weight
    method = attached(net, residual=residual, temperature=0.5)
    logits = net(tokens, use_cache=False).logits
    for row in range(len(tokens)):
        of_row = [h[row] for h in hiddens]
        expected = ladder_by_hand(method, of_row, w=8, heads=2, temperature=0.5)
        if residual:
            expected = last[row] + expected
        expect_close(logits[row], expected @ head.T, atol=1e-4)
    assert (logits - last @ head.T).abs().max() > 0.1
    method.detach(net)
    assert torch.equal(net(tokens).logits, last @ head.T)


def test_packed_documents_do_not_see_one_another(net, expect_close):
    attached(net)
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(7))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 0, 1, 2, 0]])
    packed = net(ids, position_ids=positions, use_cache=False).logits
    cuts = [(0, 0, 4), (0, 4, 9), (1, 0, 2), (1, 2, 5), (1, 5, 8), (1, 8, 9)]
    for row, start, end in cuts:
        alone = net(ids[row : row + 1, start:end], use_cache=False).logits
        expect_close(packed[row, start:end], alone[0])
    joined = net(ids, use_cache=False).logits
    expect_close(joined[0, :4], packed[0, :4])
    assert (joined[0, 4:] - packed[0, 4:]).abs().max() > 1e-2


def test_documents_are_numbered_where_positions_jump():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [5, 6, 7, 8, 2, 3], [0, 0, 0, 1, 1, 2]])
    expected = [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1], [0, 1, 2, 2, 3, 3]]
    assert documents(positions).tolist() == expected


def test_the_future_is_not_seen(net, tokens):
    attached(net)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % VOCABULARY
    one, two = net(tokens).logits, net(changed).logits
    assert torch.equal(one[:, :5], two[:, :5]) and not torch.equal(one[:, 5:], two[:, 5:])


def test_gates_start_half_open_and_close_the_rungs(net, tokens):
    method = make("ladder", net)
    method.attach(net)
    assert method.gates().tolist() == [0.5, 0.5, 0.5]
    shake(method)
    assert all(0 < g < 1 for g in method.gates().tolist())
    torch.manual_seed(8)
    hiddens = [torch.randn(2, 5, 16) for _ in range(5)]
    other = [hiddens[0], *(torch.randn(2, 5, 16) for _ in range(3)), hiddens[4]]
    assert not torch.allclose(method(hiddens, None), method(other, None), atol=1e-2)
    with torch.no_grad():
        method.alpha.fill_(10.0)  # σ(10 / 0.1) = 1
    assert torch.equal(method(hiddens, None), method(other, None))
    other[0] = torch.randn(2, 5, 16)
    assert not torch.allclose(method(hiddens, None), method(other, None), atol=1e-2)


def test_nothing_of_the_backbone_is_in_the_graph(net, tokens):
    seen = []
    for block in blocks_of(net):
        block.register_forward_hook(lambda m, a, y: seen.append(y[0] if type(y) is tuple else y))
    method = attached(net)
    logits = net(tokens).logits
    assert len(seen) == 3 and not any(h.requires_grad or h.grad_fn for h in seen)
    # even where the embeddings' output wants a gradient, as gradient checkpointing has it
    net.enable_input_require_grads()
    seen.clear()
    net(tokens).logits.sum().backward()
    assert all(h.requires_grad for h in seen)
    assert all(p.grad is None for n, p in net.named_parameters() if not n.startswith("peft."))
    assert method.embed.weight.grad.abs().max() > 0
    assert logits.requires_grad and not method.hiddens


def saved_bytes(net, batch):
    """Bytes of all tensors kept for backward, each storage once, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nats_of(net, batch).backward()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("make_net", [tiny_llama, tiny_gpt2])
def test_memory_kept_for_backward_is_far_below_loras(make_net):
    ids = torch.randint(VOCABULARY, (4, 33), generator=torch.Generator().manual_seed(9))
    batch = Batch(ids[:, :-1], ids[:, 1:], None, 128)
    kept = {}
    for name, changes in (("ladder", {"reduction": 4}), ("lora", {"rank": 1})):
        net = make_net(layers=6)
        make(name, net, **changes).attach(net)
        kept[name] = saved_bytes(net, batch)
    assert 0 < kept["ladder"] < kept["lora"] / 2


def test_backward_costs_the_side_network_alone():
    """Forward and backward counted by hand for every product."""
    net = tiny_llama()
    ids = torch.randint(VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(9))
    batch = Batch(ids[:, :-1], ids[:, 1:], None, 10)
    with FlopCounter() as frozen, torch.no_grad():
        hidden = net.model(ids[:, :-1], use_cache=False).last_hidden_state
    make("ladder", net, head_width=8).attach(net)
    with FlopCounter() as step:
        nats_of(net, batch).backward()
    with FlopCounter() as head:
        linear_nll(hidden.requires_grad_(), net.lm_head.weight, None, batch.targets).backward()
    n, d, w, layers = 10, 16, 8, 3
    rungs = (layers + 1) * d * w * 2  # forward, and the gradient of D: h wants none
    linear = layers * 12 * w * w * 3  # forward, and two gradients
    attention = layers * 5 * w * 7  # T = 5; scores, values, and backward computes the scores again
    up = w * d * 3
    assert step.total - frozen.total - head.total == 2 * n * (rungs + linear + attention + up)


def test_bf16_backbone_with_a_float32_side(net, tokens, expect_close):
    method = attached(net)
    expected = net(tokens).logits
    for name, p in net.named_parameters():
        if not name.startswith("peft."):
            p.data = p.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(net(tokens).logits.flatten(0, 1).float(), tokens.flatten())
        logits = net(tokens).logits
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in method.parameters())
    gap = (logits.float() - expected).abs().mean()
    assert 0 < gap < 0.05 * expected.abs().mean()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"use_cache": True}, "no key-value cache"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]] * 3)}, "pad on the right"),
    ],
)
def test_what_it_cannot_do_is_refused(arguments, reason, tokens):
    net = tiny_llama()
    attached(net)
    with pytest.raises(TypeError, match=reason):
        net(tokens, **arguments)
    ones = torch.ones_like(tokens)
    assert torch.equal(net(tokens, attention_mask=ones).logits, net(tokens).logits)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sites": ["o", "up"]}, "method.sites=up: o, one layer per decoder block, as this"),
        ({"reduction": 3}, "method.reduction=3: a divisor of the width 16"),
        ({"reduction": 0}, "method.reduction=0: a whole number of at least 1"),
        ({"head_width": 3}, "method.head_width=3: a divisor of the side network's width 8"),
        ({"temperature": 0}, "method.temperature=0: a finite number above 0"),
        ({"residual": "yes"}, "method.residual=yes: true or false"),
    ],
)
def test_bad_input(changes, line):
    with pytest.raises(InputError) as caught:
        make("ladder", tiny_llama(), **changes)
    assert str(caught.value).startswith(line)


def test_blocks_and_sites_must_be_as_many():
    net = tiny_llama()
    method = type(make("ladder", net))
    sites = make("ladder", net).sites[:2]
    few = method(sites, reduction=2, head_width=4, temperature=0.1, residual=True)
    with pytest.raises(InputError, match="method.sites=2 layers: .* each of the 3 decoder blocks"):
        few.attach(net)


@pytest.mark.parametrize("residual", [True, False])
def test_start(net, residual, tokens):
    base = net(tokens).logits
    method = make("ladder", net, residual=residual)
    method.attach(net)
    gap = (net(tokens).logits - base).abs().max()
    assert method.identity is residual and (gap == 0) == residual
    assert not any(m.bias.any() for m in (method.embed, *method.rungs, method.U))


def test_it_acts_on_a_model_that_goes_past_its_base_model(tokens):
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    net = OPTForCausalLM(config).eval().requires_grad_(False)
    bare = net(tokens, use_cache=False).logits
    attached(net)
    assert (net(tokens, use_cache=False).logits - bare).abs().max() > 1e-3
    targets = torch.where(tokens == 0, 1, tokens)
    batch = Batch(tokens, targets, None, tokens.numel())
    logits = net(tokens, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(nats_of(net, batch), expected)

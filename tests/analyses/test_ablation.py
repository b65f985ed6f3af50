import pytest
import torch
from conftest import NETS, attach, make

from peftlab.analyses.ablation import acting, spans
from peftlab.cards import method_names
from peftlab.fit import evaluate
from peftlab.method import NotPartial, trainable
from peftlab.parts import data_of
from peftlab.recorded import read_record, restore
from peftlab.sites import decoder_blocks

LORA = ("method=lora", "method.rank=2", "seed=0")
BITFIT = ("method=bitfit", "optimizer.lr=0.01")
WHOLE = {"ladder", "prompt_tuning"}  # they act on no layer of their own
EVERYWHERE = {
    "bitfit",
    "full",
    "layernorm",
    "top_layers",
}  # and train tensors outside the layers, too


def test_spans_of_a_known_loss():
    worth, together = (0.5, 0.25, 2.0), 0.125  # and layers 0 and 2 help each other

    def loss(on):
        states = [on(layer) for layer in range(3)]
        return (
            8
            - sum(w for w, s in zip(worth, states, strict=True) if s)
            - together * (states[0] and states[2])
        )

    found = spans(3, loss)
    assert (found.on, found.off) == (5.125, 8)
    assert found.lost == {
        **{(0, 0): 0.625, (1, 1): 0.25, (2, 2): 2.125},
        **{(0, 1): 0.875, (1, 2): 2.375, (0, 2): 2.875},
    }
    found = spans(3, loss, outside=True)
    assert (found.on, found.off) == (5.125, 8)
    assert found.lost == {
        **{(0, 0): 2.375, (1, 1): 2.625, (2, 2): 0.875},
        **{(0, 1): 2.125, (1, 2): 0.625, (0, 2): 0},
    }


def test_groups_of_layers():
    """Seven layers in at most three groups: 0-2, 3-5 and 6, whose worths are 7, 56 and 64."""

    def loss(on):
        return 128 - sum(2**layer for layer in range(7) if on(layer))

    found = spans(7, loss, groups=3)
    assert found.names == ["0-2", "3-5", "6"]
    assert found.lost == {(0, 0): 7, (0, 1): 63, (0, 2): 127, (1, 1): 56, (1, 2): 120, (2, 2): 64}
    assert (found.on, found.off) == (1, 128)
    assert spans(7, loss, groups=7) == spans(7, loss, groups=30) == spans(7, loss)
    assert spans(7, loss).names == ["0", "1", "2", "3", "4", "5", "6"]


def shaken(name, net):
    method = make(name, net)
    attach(method, net)
    start = {n: p.detach().clone() for n, p in trainable(net)}
    torch.manual_seed(6)
    with torch.no_grad():
        for _, p in trainable(net):
            p.add_(torch.randn_like(p) * 0.1)
    return method, start


def test_every_method_can_be_off_by_layers_or_says_why_not(name, tokens, expect_close):
    net = NETS["llama"]()
    bare = net(tokens, use_cache=False).logits
    method, start = shaken(name, net)
    blocks, count = decoder_blocks(net)

    def logits(*layers):
        with torch.no_grad(), acting(net, start, blocks, lambda n: n in layers):
            return net(tokens, use_cache=False).logits

    with torch.no_grad():
        adapted = net(tokens, use_cache=False).logits
    if name in WHOLE:
        with pytest.raises(NotPartial, match="acts on the model as a whole"):
            logits(0)
        return
    assert torch.equal(logits(*range(count)), adapted)
    if name not in EVERYWHERE:
        expect_close(logits(), bare)
    one, other = logits(1), logits(0, 2)
    for some in (one, other):
        assert (some - adapted).abs().max() > 1e-4 and (some - bare).abs().max() > 1e-4
    with torch.no_grad():
        assert torch.equal(net(tokens, use_cache=False).logits, adapted)
    # the hidden states that enter layer 1 do not know of later layers
    with torch.no_grad(), acting(net, start, blocks, lambda n: n == 2):
        before = net(tokens, use_cache=False, output_hidden_states=True).hidden_states[1]
    if name not in EVERYWHERE:
        method.detach(net)
        for n, p in trainable(net):
            p.data = start[n]
        expect_close(before, net(tokens, output_hidden_states=True).hidden_states[1])


def test_a_prompt_of_peft_is_no_layers(tokens):
    for kind in ("P_TUNING", "PREFIX_TUNING"):
        net = NETS["llama"]()
        method = make("hf_peft", net, peft_type=kind, args={"num_virtual_tokens": 3})
        method.attach(net)
        with (
            pytest.raises(NotPartial, match=f"{kind} acts on the model as a whole"),
            method.only(net, lambda name: True),
        ):
            pass


def test_all_methods_are_covered():
    assert set(method_names()) >= WHOLE | EVERYWHERE


def cells(answer):
    (heat,) = answer["figures"][0]["traces"]
    return heat["z"]


def test_a_run_of_lora(finished, ask):
    folder = finished(*LORA)
    answer = ask("ablation", folder, "--split", "test", "--rows", "100")
    record = read_record(folder)
    base, final = (record.result[k]["test_bits_per_token"] for k in ("base", "final"))
    z = cells(answer)
    assert z[0][3] == pytest.approx(base - final, abs=2e-6)  # all off: the frozen model
    assert f"{final:.4g} bits per token with all on, {base:.4g} with all off" in answer["notes"][0]
    assert z[2][1] is None and len(z) == len(answer["rows"]) == 4
    backbone = restore(record)  # layers 1 and 2 off by hand: their B is 0
    method = backbone.net.peft
    for site, t in zip(method.sites, method.tensors, strict=True):
        if ".h.1." in site.name or ".h.2." in site.name:
            t.B.data.zero_()
    data = data_of(record.config, backbone)
    lost = evaluate(backbone.net, data.batches(data.test), backbone.loss, autocast=False)
    assert z[1][2] == pytest.approx(lost.bits_per_token - final, abs=2e-6)
    assert abs(z[1][2]) > 1e-4
    third = answer["rows"][2]
    assert third["this layer off bits lost"] == z[2][2]
    assert third["layers up to it off bits lost"] == z[0][2]
    assert third["layers from it off bits lost"] == z[2][3]
    paired = ask("ablation", folder, "--split", "test", "--rows", "100", "--groups", "2")
    assert [row["layer"] for row in paired["rows"]] == ["0-1", "2-3"]
    assert cells(paired) == [[z[0][1], z[0][3]], [None, z[2][3]]]
    figure = paired["figures"][0]["traces"][0]
    assert (figure["x"], figure["y"]) == (["1", "3"], ["0", "2"])  # last and first layer
    assert any("at most 2 groups" in note for note in paired["notes"])
    reverse = cells(ask("ablation", folder, "--split", "test", "--rows", "100", "--off", "outside"))
    assert reverse[0][3] == pytest.approx(0, abs=2e-6)
    assert reverse[1][3] == pytest.approx(z[0][0], abs=2e-6)


def test_a_run_that_trained_in_place(finished, ask):
    folder = finished(*BITFIT)
    answer = ask("ablation", folder, "--split", "test", "--rows", "100")
    result = read_record(folder).result
    lost = result["base"]["test_bits_per_token"] - result["final"]["test_bits_per_token"]
    (without, *_), final_norm = cells(answer)[0][::-1], 0.2
    # the final norm's shift is trained, too, and stays: nearly all is lost, not all of it
    assert abs(without - lost) < final_norm and abs(without) > 1e-3


def test_what_is_refused(finished, refused):
    line = refused("ablation", finished("method=prompt_tuning"))
    assert "PromptTuning acts on the model as a whole, not on its layers one by one" in line
    for option in ("--rows", "--groups"):
        line = refused("ablation", finished(*LORA), option, "0")
        assert f"{option}=0: a whole number from 1" in line

"""The bridge to peft: what it does is what peft does, for every type that it takes."""

import sys
from copy import deepcopy

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import NETS, VOCABULARY, attach, make, shake, tiny_gpt2, tiny_llama

from peftlab.checkpoint import adapter_tensors, load_adapter, save_adapter
from peftlab.data import Batch
from peftlab.errors import InputError
from peftlab.fit import nats_of
from peftlab.method import NotMergeable, trainable
from peftlab.methods.hf_peft import REFUSED
from peftlab.nf4 import quantize_

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # peft's remarks on small layers
]
PROMPT = {"num_virtual_tokens": 3}
LIVES = {  # type: arguments that fit layers 16 wide
    "BEFT": None,
    "BOFT": None,
    "C3A": {"block_size": 8, "init_weights": True},
    "CARTRIDGE": PROMPT,
    "DEFT": None,
    "DELORA": {"delora_lambda": 1},  # 15 is for wide layers
    "FOURIERFT": {"n_frequency": 20, "init_weights": True},
    "FROD": None,
    "GLORA": None,
    "GRALORA": {"r": 4},
    "HIRA": None,
    "HRA": None,
    "IA3": None,
    "LILY": None,
    "LN_TUNING": {"target_modules": None},
    "LOHA": None,
    "LOKR": None,
    "LORA": {"r": 4, "use_dora": True},
    "MISS": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 8},
    "OSF": None,
    "PEANUT": None,
    "PREFIX_TUNING": PROMPT,
    "PROMPT_TUNING": PROMPT,
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "P_TUNING": PROMPT,
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "SUPERTUNING": None,
    "TINYLORA": None,
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2, 3]},
    "UNILORA": None,
    "VBLORA": {"num_vectors": 16, "vector_length": 4, "r": 2, "topk": 2},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 20},
}
NOT_IDENTITY = {"CARTRIDGE", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "UNILORA", "VBLORA"}
NOT_MERGED = {"BEFT", "CARTRIDGE", "LILY", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}


def loss_of(net, tokens):
    logits = net(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def test_every_type_is_taken_or_refused():
    types = {name.value for name in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING}
    assert types - set(REFUSED) == set(LIVES)


@pytest.mark.parametrize("kind", LIVES)
def test_the_life_of_a_type(kind, tokens, tmp_path, expect_close):
    net = tiny_llama(layers=1)
    other, base, keys = deepcopy(net), net(tokens).logits, set(net.state_dict())
    method = make("hf_peft", net, peft_type=kind, args=LIVES[kind])
    attach(method, net)
    started = (net(tokens).logits - base).abs().max() < 1e-4
    assert started == (kind not in NOT_IDENTITY)
    assert all(n.startswith("peft.") and p.dtype == torch.float32 for n, p in trainable(net))
    optimizer = torch.optim.AdamW([p for _, p in trainable(net)], lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(net, tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[3] < losses[0]
    shake(method)
    adapted = net(tokens).logits
    assert (adapted - base).abs().max() > 1e-2
    save_adapter(net, tmp_path / "adapter.safetensors", {})
    torch.manual_seed(99)
    twin = make("hf_peft", other, peft_type=kind, args=LIVES[kind])
    twin.attach(other)
    load_adapter(other, tmp_path / "adapter.safetensors")
    assert torch.equal(other(tokens).logits, adapted)
    assert method.mergeable == (kind not in NOT_MERGED)
    if method.mergeable:
        method.merge(net)
        expect_close(net(tokens).logits, adapted, atol=1e-4)
    else:
        with pytest.raises(NotMergeable):
            method.merge(net)
        method.detach(net)
    assert set(net.state_dict()) == keys
    twin.detach(other)
    assert torch.equal(other(tokens).logits, base) and set(other.state_dict()) == keys
    assert not hasattr(other, "peft_config") and not other.base_model._forward_pre_hooks


@pytest.mark.parametrize("kind", ["LORA", "OFT", "IA3", "VERA", "P_TUNING", "PREFIX_TUNING"])
def test_logits_gradients_and_count_are_pefts(kind, net, tokens, expect_close):
    theirs = deepcopy(net)
    method = make("hf_peft", net, peft_type=kind, args=LIVES[kind])
    attach(method, net)
    shake(method)
    keywords = {"target_modules": [s.name for s in method.sites], **(LIVES[kind] or {})}
    if kind in ("P_TUNING", "PREFIX_TUNING"):
        del keywords["target_modules"]
    config = peft.get_peft_config({"peft_type": kind, "task_type": "CAUSAL_LM", **keywords})
    theirs = peft.get_peft_model(theirs, config).eval()
    count = theirs.get_nb_trainable_parameters()[0]
    assert sum(p.numel() for _, p in trainable(net)) == count
    ours = {
        name.removeprefix("layers.").replace("/", ".").replace("encoder.", "prompt_encoder."): t
        for name, t in method.state_dict(keep_vars=True).items()
    }
    pairs = {
        name: (ours[name.removeprefix("base_model.model.")], p)
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert {id(a) for a, _ in pairs.values()} == {id(p) for _, p in trainable(net)}
    with torch.no_grad():
        for a, b in pairs.values():
            b.copy_(a)
        if kind == "VERA":
            for side in ("vera_A", "vera_B"):
                (name,) = (n for n in ours if n.endswith(f"{side}.default"))
                getattr(theirs.base_model, side)["default"].copy_(ours[name])
    expect_close(net(tokens).logits, theirs(input_ids=tokens).logits[:, -tokens.shape[1] :])
    hidden = net.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # as in a run
    expect_close(net.lm_head(hidden), net(tokens).logits)
    loss_of(net, tokens).backward()
    logits = theirs(input_ids=tokens).logits[:, -tokens.shape[1] :][:, :-1]
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, (a, b) in pairs.items():
        assert a.grad.abs().max() > 0, name
        expect_close(a.grad, b.grad)


def test_constants_are_stored_once():
    net = tiny_llama()
    attach(make("hf_peft", net, peft_type="VERA", args={"r": 8, "save_projection": False}), net)
    shapes = [t.shape for n, t in adapter_tensors(net).items() if "vera_A" in n or "vera_B" in n]
    assert sorted(shapes) == [(8, 24), (24, 8)]
    net = tiny_llama()
    method = make("hf_peft", net, peft_type="SHIRA", args={"r": 2})
    attach(method, net)
    indices = [t for n, t in adapter_tensors(net).items() if "shira_indices" in n]
    assert len(indices) == len(method.sites)
    net.double()
    assert method.wrapped[0][2].shira_indices["default"] is method.kept[0][0]["default"]


def test_frozen_weights_in_bf16():
    tokens = torch.randint(VOCABULARY, (3, 7))
    for kind in ("LORA", "OFT", "PREFIX_TUNING"):
        net = tiny_llama().bfloat16()
        attach(make("hf_peft", net, peft_type=kind, args=LIVES[kind]), net)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net, tokens)
        loss.backward()
        for name, p in trainable(net):
            assert p.dtype == torch.float32 and p.grad is not None, name


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        ("lora", None, r"method.peft_type=lora: unknown to peft; one of .*LORA"),
        ("ADALORA", None, "method.peft_type=ADALORA: it must be called after each step; take"),
        ("POLY", None, "method.peft_type=POLY: it needs the task of each row; one of"),
        ("LORA", {"rank": 4}, r"method.args=.*refused by peft's LORA \(.*'rank'"),
        ("LORA", {"r": 0}, r"method.peft_type=LORA: refused by peft: `r` should be a positive"),
        ("LORA", 7, "method.args=7: null, or a mapping"),
        ("LORA", {"bias": "all"}, r"method.peft_type=LORA: trains \['base_model.*bias'\]"),
        ("LORA", {"init_lora_weights": "pissa"}, "method.peft_type=LORA: changes the model's own"),
        ("LORA", {"modules_to_save": ["lm_head"]}, "LORA: replaces lm_head as a whole"),
        ("LORA", {"target_modules": ["nothing"]}, "LORA: refused by peft: Target modules"),
    ],
)
def test_what_is_refused(kind, args, message):
    net = tiny_gpt2(layers=1)
    keys, modules = set(net.state_dict()), list(net.modules())
    with pytest.raises(InputError, match=message) as error:
        attach(make("hf_peft", net, peft_type=kind, args=args), net)
    assert "\n" not in str(error.value)
    assert set(net.state_dict()) == keys and list(net.modules()) == modules


def test_a_quantised_model_is_refused():
    net = tiny_llama(layers=1)
    method = make("hf_peft", net)
    quantize_([site.module for site in method.sites], torch.device("cpu"))
    with pytest.raises(InputError, match="model.quantize=nf4: null for HfPeft"):
        method.attach(net)


def test_without_peft_it_says_what_to_install(monkeypatch):
    net = tiny_llama(layers=1)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"^method=hf_peft: .* pip install 'peftlab\[peft\]'$"):
        make("hf_peft", net)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_a_prompt_needs_room_and_rows_that_are_not_packed(kind):
    net = NETS["gpt2"](1)  # 64 positions
    method = make("hf_peft", net, peft_type=kind, args={"num_virtual_tokens": 10})
    method.attach(net)

    def prepare(length, positions):
        ids = torch.zeros(1, length, dtype=torch.long)
        batch = Batch(ids, ids, positions, length)
        method.prepare(lambda batch: nats_of(net, batch), [batch])

    prepare(54, None)
    with pytest.raises(InputError, match="=10: at most 9 "):
        prepare(55, None)
    with pytest.raises(InputError, match="dataset.packing=true: false"):
        prepare(9, torch.arange(9)[None])

"""Loading: every mapped family, safetensors only, and what is said of a bad folder."""

import shutil

import pytest
import torch
import transformers
from conftest import tiny_gpt2, tiny_llama
from torch import nn

from peftlab.backbone import load_backbone
from peftlab.bits import IGNORE
from peftlab.data import Batch
from peftlab.errors import InputError
from peftlab.sites import FAMILIES, find_sites, kinds_of

SIZES = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA_KINDS = {"q", "k", "v", "o", "gate", "up", "down"}
FAMILY_KINDS = {
    "Llama": LLAMA_KINDS,
    "Mistral": LLAMA_KINDS,
    "Gemma": LLAMA_KINDS,
    "Gemma2": LLAMA_KINDS,
    "Gemma3Text": LLAMA_KINDS,
    "Qwen2": LLAMA_KINDS,
    "Qwen3": LLAMA_KINDS,
    "GPTNeoX": {"qkv", "o", "up", "down"},
    "GPT2": {"qkv", "o", "up", "down"},
    "OPT": {"q", "k", "v", "o", "up", "down"},
}


def model(folder, **changes):
    return {
        "name": "hub",
        "source": "hub",
        "path": str(folder),
        "revision": None,
        "sha256": None,
        "device": "cpu",
        "dtype": "auto",
        "quantize": None,
        "attention": "auto",
        "kinds": None,
        **changes,
    }


def load(folder, **changes):
    return load_backbone(model(folder, **changes), precision="fp32", block_length=64)


def family(name):
    config_class = getattr(transformers, f"{name}Config")
    if name == "GPT2":
        config = config_class(vocab_size=32, n_embd=16, n_layer=2, n_head=2)
    elif name == "OPT":
        config = config_class(
            **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
            ffn_dim=24,
            word_embed_proj_dim=16,
        )
    else:
        config = config_class(**SIZES)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", FAMILY_KINDS)
def test_every_family_loads_and_has_its_sites(name, tmp_path):
    net = family(name).eval()
    net.save_pretrained(tmp_path)
    backbone = load(tmp_path)
    kinds = kinds_of(backbone.net.config.model_type, None)
    sites = find_sites(backbone.net, kinds, "all")
    assert {site.kind for site in sites} == FAMILY_KINDS[name]
    assert len(sites) == 2 * len(FAMILY_KINDS[name])
    assert not any("lm_head" in site.name or "embed" in site.name for site in sites)
    ids = torch.tensor([[1, 5, 9, 3, 2]])
    batch = Batch(ids, torch.tensor([[5, 9, IGNORE, 2, 4]]), None, 5)
    torch.testing.assert_close(backbone.net(ids).logits, net(ids).logits, rtol=1e-4, atol=1e-5)
    logits = net(ids).logits[0, [0, 1, 3, 4]]
    expected = -logits.log_softmax(-1)[range(4), [5, 9, 2, 4]].sum()
    torch.testing.assert_close(backbone.loss(backbone.net, batch), expected, rtol=1e-5, atol=1e-5)
    assert backbone.linear_logits == (name != "Gemma2")  # which caps its logits
    assert not any(p.requires_grad for p in backbone.net.parameters())


def test_conv1d_becomes_linear_without_changing_a_bit_of_the_function():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)
    net = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(10)[None]
    before = net(ids).logits
    from peftlab.backbone import conv1d_to_linear

    conv1d_to_linear(net)
    assert not any(type(m).__name__ == "Conv1D" for m in net.modules())
    attention = net.transformer.h[0].attn.c_attn
    assert isinstance(attention, nn.Linear) and attention.weight.shape == (48, 16)
    torch.testing.assert_close(net(ids).logits, before, rtol=1e-5, atol=1e-6)


def test_dtype_of_the_frozen_weights(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    for dtype, precision, expected in (
        ("auto", "bf16", torch.bfloat16),
        ("auto", "fp32", torch.float32),
        ("fp32", "bf16", torch.float32),
    ):
        found = load_backbone(model(tmp_path, dtype=dtype), precision=precision, block_length=64)
        assert {p.dtype for p in found.net.parameters()} == {expected}


@pytest.mark.parametrize(
    ("precision", "length", "attention", "expected"),
    [
        ("bf16", 128, "auto", "eager"),
        ("bf16", 129, "auto", "sdpa"),
        ("fp32", 128, "auto", "sdpa"),
        ("fp32", 64, "eager", "eager"),
        ("bf16", 64, "sdpa", "sdpa"),
    ],
)
def test_attention_on_the_cpu(precision, length, attention, expected, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    settings = model(tmp_path, attention=attention)
    net = load_backbone(settings, precision=precision, block_length=length).net
    assert net.config._attn_implementation == expected


def test_sha256_is_that_of_the_weights(tmp_path):
    import hashlib

    tiny_llama().save_pretrained(tmp_path)
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert load(tmp_path).sha256 == digest
    assert load(tmp_path, sha256=digest).sha256 == digest
    with pytest.raises(InputError, match="model.sha256=0000"):
        load(tmp_path, sha256="0000")


def test_a_pickle_is_never_loaded(tmp_path):
    net = tiny_llama()
    net.config.save_pretrained(tmp_path)
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load(tmp_path)


def test_bad_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_gpt2().save_pretrained(tmp_path / "good")
    weights = tmp_path / "good" / "model.safetensors"
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "good", cut)
    (cut / "model.safetensors").write_bytes(weights.read_bytes()[:-1000])
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in (
        (cut, "cannot be loaded"),
        (empty, "safetensors"),
        (tmp_path / "nowhere", "a folder that exists"),
        ("someone/something", "within reach on the hub"),
        ("not a name!!", "within reach on the hub"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load(path)
        assert str(caught.value).startswith("model.path=") and "\n" not in str(caught.value)


def test_an_unknown_architecture_says_how_to_name_its_layers():
    with pytest.raises(InputError, match=r"model\.kinds=null.*bloom.*model\.kinds=\{q: "):
        kinds_of("bloom", None)
    given = {"q": "self_attn.q_proj"}
    assert kinds_of("bloom", given) == given
    assert {site.kind for site in find_sites(tiny_llama(), given, "all")} == {"q"}


def test_kinds_and_sites_that_do_not_fit():
    net = tiny_llama()
    with pytest.raises(InputError, match=r"method\.sites=zz: this model has the kinds q, k, v"):
        find_sites(net, FAMILIES["llama"], ["q", "zz"])
    with pytest.raises(InputError, match=r"method\.sites=\[\]"):
        find_sites(net, FAMILIES["llama"], [])
    with pytest.raises(InputError, match=r"model\.kinds\.q=attn\.nope"):
        find_sites(net, {"q": "attn.nope"}, "all")
    sites = find_sites(net, FAMILIES["llama"], ["v", "q"])
    assert [s.name for s in sites[:2]] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]


def test_device_and_words():
    for change in ({"device": "tpu"}, {"device": "cuda:99"}, {"dtype": "fp8"}, {"attention": "x"}):
        ((key, value),) = change.items()
        with pytest.raises(InputError, match=f"model.{key}={value}"):
            load("anywhere", **change)

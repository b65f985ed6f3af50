"""Every exported form is loaded by its foreign reader, and computes what the adapted model does."""

import json
import shutil
from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import NETS, attach, make
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from peftlab.__main__ import main
from peftlab.cards import method_names
from peftlab.errors import InputError
from peftlab.export import save_merged, write_peft
from peftlab.method import attached, trainable
from peftlab.peft_form import NoPeftForm
from peftlab.recorded import read_exported, read_record, restore

pytestmark = [
    # peft 0.21 asks transformers 5.23 by a name that is going away
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # its remarks on norms and small layers
]

HERE = {"source": "bundled", "path": "tiny", "revision": None}
LOW_RANK = (
    "adalora adamix_lora gamma_lora lora normed_lora partially_tied_lora pissa rslora "
    "strong_gamma_lora tensor_embedding tied_lora tied_lora_extra"
).split()
FORMS = dict.fromkeys((*LOW_RANK, "dora", "simple_dora"), "LORA") | {
    "hf_peft": "LORA",
    "ia3": "IA3",
    "krona": "LOKR",
    "layernorm": "LN_TUNING",
    "lokr": "LOKR",
    "prefix_tuning": "PREFIX_TUNING",
    "prompt_tuning": "PROMPT_TUNING",
    "vera": "VERA",
}
NOT_GPT2 = {
    "krona": "LOKR does not know layers of the class Conv1D",
    "lokr": "LOKR does not know layers of the class Conv1D",
    "prefix_tuning": "takes positions, which this model adds",
}


def plain(net: Any) -> nn.Module:
    """The same function in the classes that transformers builds: GPT-2 with its Conv1D again."""
    if net.config.model_type != "gpt2":
        return deepcopy(net)
    twin = GPT2LMHeadModel(net.config).eval()
    weights = dict(net.state_dict())
    for name, module in twin.named_modules():
        if isinstance(module, Conv1D):
            weights[f"{name}.weight"] = weights[f"{name}.weight"].T
    twin.load_state_dict(weights)
    return twin


def adapt(name: str, net: Any, **changes: object) -> Any:
    """Attach a method away from its start, in the form in which it is saved."""
    method = make(name, net, **changes)
    attach(method, net)
    torch.manual_seed(6)
    with torch.no_grad():
        for _, p in trainable(net):
            p.add_(torch.randn_like(p) * 0.1)
    method.compact()
    return method


def to_peft(net: Any, method: Any, folder: Any) -> dict:
    with torch.no_grad():
        form = method.peft_form(net)
    write_peft(form, net.config, folder, model=HERE)
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("name", FORMS)
def test_peft_computes_the_same(name, net, tokens, tmp_path, expect_close):
    base, bare = plain(net), net(tokens).logits
    method = adapt(name, net)
    adapted = net(tokens).logits
    assert (adapted - bare).abs().max() > 1e-2
    if net.config.model_type == "gpt2" and name in NOT_GPT2:
        with pytest.raises((InputError, NoPeftForm), match=NOT_GPT2[name]):
            to_peft(net, method, tmp_path)
        return
    config = to_peft(net, method, tmp_path)
    assert torch.equal(net(tokens).logits, adapted)  # whatever was tried is undone
    assert config["peft_type"] == FORMS[name]
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    logits = theirs(input_ids=tokens).logits[:, -tokens.shape[1] :]
    expect_close(logits, adapted, atol=2e-5)


def test_every_other_method_says_that_it_has_no_form(tokens):
    others = set(method_names()) - set(FORMS)
    assert len(others) > 10
    for name in others:
        net = NETS["llama"]()
        with pytest.raises(NoPeftForm, match="peft has no type that computes what"):
            adapt(name, net).peft_form(net)


def test_ranks_are_those_that_count(tokens, tmp_path, expect_close):
    net = NETS["llama"]()
    base = plain(net)
    method = adapt("adalora", net)
    zero = {0: [0, 1, 2], 1: [3], 2: [0, 1, 2, 3]}  # triplets of the first three sites
    with torch.no_grad():
        for site, dropped in zero.items():
            method.tensors[site].Lambda[dropped] = 0
    config = to_peft(net, method, tmp_path)
    names = [site.name for site in method.sites[:3]]
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == dict(zip(names, (1, 3, 1), strict=True))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors[f"base_model.model.{names[0]}.lora_A.weight"].shape == (1, 16)
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    expect_close(theirs(input_ids=tokens).logits, net(tokens).logits)


def test_a_part_of_the_kinds_and_two_factors(tokens, tmp_path, expect_close):
    net = NETS["llama"]()
    base = plain(net)
    method = adapt("lokr", net, sites=["q", "down"], factor=2, rank=1)
    config = to_peft(net, method, tmp_path)
    assert len(config["target_modules"]) == 6 and config["decompose_factor"] == 2
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.2.mlp.down_proj.lokr_w2"
    assert tensors[f"{name}_a"].shape == (8, 1) and tensors[f"{name}_b"].shape == (1, 12)
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    expect_close(theirs(input_ids=tokens).logits, net(tokens).logits)
    net = NETS["llama"]()
    with pytest.raises(NoPeftForm, match="by one factor, and here are two"):
        adapt("krona", net, a_1=2, a_2=4).peft_form(net)


@pytest.mark.parametrize("kind", ["VERA", "P_TUNING", "PREFIX_TUNING", "OFT"])
def test_what_hf_peft_trained_is_what_peft_loads(kind, tokens, tmp_path, expect_close):
    net = NETS["llama"]()
    base, bare = plain(net), net(tokens).logits
    args = {"num_virtual_tokens": 3} if "TUNING" in kind else {"r": 4}
    args = {"r": 0, "oft_block_size": 8} if kind == "OFT" else args
    method = adapt("hf_peft", net, peft_type=kind, args=args)
    adapted = net(tokens).logits
    config = to_peft(net, method, tmp_path)
    assert torch.equal(net(tokens).logits, adapted) and attached(net) is method
    assert config["base_model_name_or_path"] is None
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    expect_close(theirs(input_ids=tokens).logits[:, -tokens.shape[1] :], adapted)
    method.detach(net)
    assert torch.equal(net(tokens).logits, bare)


def test_a_prefix_behind_a_window_has_no_form(tokens):
    torch.manual_seed(0)
    settings = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    types = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
    for given, refused in (({}, False), ({"use_sliding_window": True, **types}, True)):
        net = Qwen3ForCausalLM(Qwen3Config(**settings, **heads, **given)).eval()
        method = adapt("prefix_tuning", net)
        if refused:
            with pytest.raises(NoPeftForm, match="part of the window"):
                method.peft_form(net)
        else:
            config, tensors = method.peft_form(net)
            assert config["token_dim"] == 8 and config["num_attention_heads"] == 2
            assert tensors["prompt_embeddings"].shape == (3, 2 * 2 * 8)


@pytest.mark.parametrize("name", ["lora", "bitfit", "ia3", "full", "layernorm", "hf_peft"])
def test_a_merged_model_is_one_of_transformers(name, net, tokens, tmp_path, expect_close):
    kinds = ["q", "v"] if "bitfit" == name and net.config.model_type == "llama" else "all"
    adapt(name, net, **({"sites": kinds} if name == "bitfit" else {}))
    adapted = net(tokens).logits
    attached(net).merge(net)
    save_merged(net, tmp_path, dtype=torch.float32)
    loaded, lost = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(lost.values())
    assert isinstance(loaded, type(plain(NETS[net.config.model_type]())))
    expect_close(loaded(tokens).logits, adapted)
    if name == "bitfit" and net.config.model_type == "llama":
        assert loaded.config.attention_bias and not loaded.config.mlp_bias
        layer = loaded.model.layers[0].self_attn
        assert layer.q_proj.bias.abs().min() > 0 and layer.o_proj.bias.abs().max() == 0


def test_a_bias_without_a_place_is_refused(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    net = Qwen3ForCausalLM(config).eval()
    adapt("bitfit", net, sites=["up"])
    attached(net).merge(net)
    with pytest.raises(InputError, match="no place for model.layers.0.mlp.up_proj.bias"):
        save_merged(net, tmp_path, dtype=torch.float32)


@pytest.fixture
def done(finished):
    """A run of tied_lora on tiny_gpt2."""
    return finished("method=tied_lora", "method.rank=4")


def ids_of(text, folder):
    return AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids


def test_three_forms_of_a_run(done, tmp_path, capsys):
    outs = {form: tmp_path / form for form in ("merged", "adapter", "peft")}
    for form, out in outs.items():
        assert main(["export", str(done), "--to", form, "-o", str(out)]) == 0
    told = capsys.readouterr().out
    backbone = restore(read_record(done))
    adapted, tokenizer = backbone.net, backbone.tokenizer()
    text = "3 and 4 make seven, and the river ran on."
    ids = ids_of(text, outs["merged"])
    assert ids.tolist() == tokenizer(text, return_tensors="pt").input_ids.tolist()
    with torch.no_grad():
        wanted = adapted(ids).logits
        start = restore(read_record(done), trained=False).net(ids).logits
        assert (wanted - start).abs().max() > 1e-2
        # merged: by plain transformers
        merged, lost = AutoModelForCausalLM.from_pretrained(
            outs["merged"], output_loading_info=True
        )
        assert not any(lost.values()) and merged.dtype == torch.float32
        tolerance = json.loads((done / "result.json").read_text())["merge"]["tolerance"]
        assert (merged(ids).logits - wanted).abs().max() <= tolerance
        assert f"(tolerance in fp32: {tolerance:.2g})" in told
        generation = json.loads((outs["merged"] / "generation_config.json").read_text())
        assert generation["eos_token_id"] == adapted.config.eos_token_id
        # adapter: by peftlab
        again = restore(read_exported(outs["adapter"]))
        assert torch.equal(again.net(ids).logits, wanted)
        # peft: by peft, on a plain base; tied factors are written out
        base = AutoModelForCausalLM.from_pretrained(again.folder, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, outs["peft"]).eval()
        assert (theirs(input_ids=ids).logits - wanted).abs().max() <= tolerance
    config = json.loads((outs["peft"] / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] and config["r"] == 4
    assert not list(tmp_path.glob(".*"))  # no temporary folder is left


def test_an_adapter_exports_on_and_knows_its_base(done, tmp_path, capsys):
    out = tmp_path / "adapter"
    assert main(["export", str(done), "--to", "adapter", "-o", str(out)]) == 0
    about = json.loads((out / "peftlab.json").read_text())
    assert set(about) == {"form", "config", "result"}
    assert str(done) not in json.dumps(about)  # nothing of where and on what data it was made
    assert main(["export", str(out), "--to", "peft", "-o", str(tmp_path / "peft")]) == 0
    first, second = (
        load_file(tmp_path / "peft" / "adapter_model.safetensors"),
        load_file(_peft_of(done, tmp_path)),
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    backbone = restore(read_exported(out))
    moved = tmp_path / "moved"
    backbone.net.peft.detach(backbone.net)
    with torch.no_grad():
        next(backbone.net.parameters()).mul_(1.001)
    save_merged(backbone.net, moved, dtype=torch.float32)
    backbone.tokenizer().save_pretrained(moved)
    with pytest.raises(InputError, match=r"model.sha256=\w+: that of the base of"):
        restore(read_exported(out), base=moved)
    capsys.readouterr()
    words = ["export", str(out), "--to", "merged", "-o", str(tmp_path / "m"), "--base", str(moved)]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("peftlab: model.sha256=") and not (tmp_path / "m").exists()


def _peft_of(done, tmp_path):
    assert main(["export", str(done), "--to", "peft", "-o", str(tmp_path / "straight")]) == 0
    return tmp_path / "straight" / "adapter_model.safetensors"


def test_a_run_on_a_model_in_nf4(finished, tmp_path, capsys):
    """Merged is the decoded base with W'; the adapter is for that base; peft has no word for it."""
    done = finished("method=lora", "method.rank=4", "optimizer.lr=0.01", "model.quantize=nf4")
    record = read_record(done)
    for form in ("merged", "adapter"):
        assert main(["export", str(done), "--to", form, "-o", str(tmp_path / form)]) == 0
    backbone = restore(record)
    ids = ids_of("3 and 4 make seven, and the river ran on.", tmp_path / "merged")
    tolerance = record.result["merge"]["tolerance"]
    with torch.no_grad():
        wanted = backbone.net(ids).logits  # by the packed weights
        assert torch.equal(restore(read_exported(tmp_path / "adapter")).net(ids).logits, wanted)
        merged, lost = AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged", output_loading_info=True
        )
        assert not any(lost.values())
        assert (merged(ids).logits - wanted).abs().max() <= tolerance
        # the dense base with the same adapter, and the base alone, are other functions
        about = json.loads((tmp_path / "adapter" / "peftlab.json").read_text())
        about["config"]["model"]["quantize"] = None
        (tmp_path / "adapter" / "peftlab.json").write_text(json.dumps(about))
        for other in (restore(read_exported(tmp_path / "adapter")), restore(record, trained=False)):
            assert (other.net(ids).logits - wanted).abs().max() > 10 * tolerance
    capsys.readouterr()
    assert main(["export", str(done), "--to", "peft", "-o", str(tmp_path / "peft")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("peftlab: --to=peft: trained on a base in nf4, of which an adapter")
    assert not (tmp_path / "peft").exists()


def test_bf16_is_smaller_and_says_what_it_costs(done, tmp_path):
    out = tmp_path / "deep" / "merged"
    words = ["export", str(done), "--to", "merged", "-o", str(out), "--dtype", "bf16"]
    assert main(words) == 0
    about = json.loads((out / "peftlab.json").read_text())
    assert about["dtype"] == "bf16" and about["max_abs_logit_diff"] > about["tolerance"]
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_what_cannot_be_exported(done, finished, tmp_path, capsys):
    def refused(run_folder, form, out, told):
        before = sorted(tmp_path.rglob("*"))
        assert main(["export", str(run_folder), "--to", form, "-o", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("peftlab: ") and told in line, line
        assert sorted(tmp_path.rglob("*")) == before

    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    capsys.readouterr()
    refused(done, "merged", full, "a folder that is empty, or not there yet")
    refused(done, "merged", full / "file" / "deeper", "cannot be written (File exists)")
    assert main(["export", str(done), "--to", "peft", "-o", "x", "--dtype", "bf16"]) == 2
    assert "--dtype=bf16: only of --to merged" in capsys.readouterr().err
    assert main(["export", str(done), "--to", "gguf", "-o", "x"]) == 2
    assert "--to=gguf: one of merged, adapter, peft" in capsys.readouterr().err
    refused(tmp_path, "peft", tmp_path / "out", "a run folder: it holds config.yaml")
    prompt = tmp_path / "prompt"
    shutil.copytree(finished("method=prompt_tuning"), prompt)
    refused(prompt, "merged", tmp_path / "out", "--to=merged: it is input, and changes no weight")
    (prompt / "adapter.safetensors").write_bytes((done / "adapter.safetensors").read_bytes())
    refused(prompt, "adapter", tmp_path / "out", "its adapter is that of run ")
    refused(prompt, "peft", tmp_path / "out", "holds tensors of another method, size or model")


def test_an_exported_adapter_is_not_trusted(done, tmp_path):
    out = tmp_path / "adapter"
    assert main(["export", str(done), "--to", "adapter", "-o", str(out)]) == 0
    path = out / "peftlab.json"
    about = json.loads(path.read_text())

    def refused(changed, told):
        path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
        with pytest.raises(InputError, match=told):
            restore(read_exported(out))

    evil = {**about["config"]["method"], "_target_": "os.mkdir", "path": str(tmp_path / "planted")}
    refused({**about, "config": {**about["config"], "method": evil}}, "_target_=os.mkdir: a class")
    refused({**about, "form": "peft"}, "an adapter; this is the form peft")
    refused({"config": {}, "result": {}}, "is no exported adapter")
    refused("{", "is no exported adapter")
    less = {k: v for k, v in about["config"].items() if k != "seed"}
    refused({**about, "config": less}, r"of another version: peftlab.json lacks \['seed'\]")
    other = {**about["config"]["method"], "rank": 2}
    refused({**about, "config": {**about["config"], "method": other}}, "another method, size")
    refused({**about, "result": {**about["result"], "run_id": "0"}}, "of run ")
    assert not (tmp_path / "planted").exists()

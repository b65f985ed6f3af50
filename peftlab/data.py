"""Token batches of a data set: tokenised once, cached, in an order that is a pure function.

Padding is on the right and known by length only, never by its id: many tokenizers pad with EOS,
and EOS must be learnt.
"""

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftlab.bits import IGNORE
from peftlab.documents import Tokens, tokenise
from peftlab.errors import InputError, require
from peftlab.files import cache_dir, making, save_tensors
from peftlab.sources import find_source
from peftlab.splits import choose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # seconds to import; a warm start needs none

VERSION = 1  # raise it whenever the same request would give other tokens
SPLITS = ("train", "test")
KEYS = (  # of conf/dataset/*.yaml
    "name source path subset revision train_split test_split template replace loss_on "
    "block_length packing train_size test_size split_by split_seed"
).split()
BUCKET_STEPS = 8  # examples are sorted by length within this many steps: little padding
EVAL_TOKENS = 4096  # padded tokens per evaluation batch: bounds memory, keeps the cores busy
# What a pass through the model takes beside its tokens, in tokens: measured 14 to 170 on a CPU, the
# least by one thread in float32 and the most by two in bf16.
PASS = 64
ALONE = 2**40  # on top for a pass over one row, for which compiled blocks need another graph


class Example(NamedTuple):
    """A row of a batch before padding: ids, targets [T] int32; positions [T] int32 or None."""

    ids: Tensor
    targets: Tensor
    positions: Tensor | None


class Batch(NamedTuple):
    """Examples padded on the right, int64.

    ids [B, T]; targets [B, T], already shifted: targets[b, t] is to be predicted from
    ids[b, : t + 1], or is IGNORE; positions [B, T], or None where each row is one document, for
    which a causal mask is enough. With packing, positions restart at 0 at each document, and a
    transformers model that gets `position_ids=positions`, no attention_mask and `use_cache=False`
    (a cache would switch it off) masks across documents itself.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor | None
    n_tokens: int  # without padding

    @property
    def n_targets(self) -> int:
        """Positions that are scored."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to a device; to a GPU without waiting for it."""
        gpu = torch.device(device).type == "cuda"

        def copy(tensor: Tensor) -> Tensor:
            if gpu and tensor.device.type == "cpu":
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        positions = None if self.positions is None else copy(self.positions)
        return Batch(copy(self.ids), copy(self.targets), positions, self.n_tokens)


@dataclass(frozen=True)
class Split:
    """The tokenised rows of one split, and what they add up to."""

    examples: Sequence[Example]
    n_rows: int  # before packing
    n_targets: int
    n_bytes: int  # UTF-8 bytes of the scored text, exact to a character where a row is cut; EOS: 0
    n_truncated: int  # rows
    n_truncated_tokens: int


@dataclass(frozen=True)
class Data:
    """Both splits, and the order in which training sees its own."""

    name: str
    train: Split
    test: Split
    fingerprint: str  # sha256 over the tokens of both splits: ids, targets, positions
    seed: int
    batch: int
    micro_batch: int

    @property
    def n_steps(self) -> int:
        """Optimizer steps per epoch."""
        return math.ceil(len(self.train.examples) / self.batch)

    def steps(self, epoch: int, *, split: bool = False) -> list[list[Batch]]:
        """Return the micro-batches of each optimizer step: every example once, in shuffled order.

        split: divide them further where that saves more padding than a pass costs.
        Pure in (seed, epoch, batch, micro_batch, split), and which examples make a step does not
        depend on the last two. They are of similar length. The last step may be smaller.
        """
        generator = torch.Generator().manual_seed(_seed_of(self.seed, epoch))
        lengths = [len(example.ids) for example in self.train.examples]
        order = torch.randperm(len(lengths), generator=generator).tolist()
        by_length = [
            index
            for window in _chunks(order, self.batch * BUCKET_STEPS)
            for index in sorted(window, key=lengths.__getitem__, reverse=True)
        ]
        steps = [
            [self.train.examples[index] for index in step]
            for step in _chunks(by_length, self.batch)
        ]
        n_whole = len(lengths) // self.batch  # an incomplete step stays last
        shuffled = torch.randperm(n_whole, generator=generator).tolist()
        order = [*shuffled, *range(n_whole, len(steps))]
        return [
            [
                pad(part)
                for whole in _chunks(steps[at], self.micro_batch)
                for part in (_divided(whole) if split else [whole])
            ]
            for at in order
        ]

    def batches(self, split: Split) -> list[Batch]:
        """Return the examples of a split for evaluation, each once, longest first.

        At most EVAL_TOKENS padded tokens to a batch; a longer example makes one of its own.
        """
        examples = sorted(split.examples, key=lambda example: len(example.ids), reverse=True)
        return [pad(part) for part in _divided(examples, tokens=EVAL_TOKENS)]


def _divided(
    examples: Sequence[Example], *, tokens: float = math.inf
) -> Iterator[Sequence[Example]]:
    """Divide `examples`, longest first, so that all passes together take the least time.

    That is, counted in tokens, padding included, and PASS for each; no example is alone where it
    need not be. tokens: the most, with padding, of a part of several examples.
    """
    lengths = [len(example.ids) for example in examples]
    # Of the first n examples: what they take at best, and where their last part begins then.
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(lengths) + 1):
        ways = []
        for first in reversed(range(end)):
            size = lengths[first] * (end - first)
            if size > tokens and ways:
                break  # and so would be all larger parts
            price = PASS if ways else PASS + ALONE
            ways.append((best[first][0] + size + price, first))
        best.append(min(ways))
    ends = [len(lengths)]
    while ends[-1]:
        ends.append(best[ends[-1]][1])
    ends.reverse()
    return (examples[first:end] for first, end in itertools.pairwise(ends))


def pad(examples: Sequence[Example]) -> Batch:
    """Join examples into a Batch as wide as the longest of them."""
    shape = (len(examples), max(len(example.ids) for example in examples))
    ids = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORE, dtype=torch.int64)
    positions = torch.zeros(shape, dtype=torch.int64)
    packed = False
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        targets[row, : len(example.ids)] = example.targets
        if example.positions is not None:
            positions[row, : len(example.ids)] = example.positions
            packed = True
    n_tokens = sum(len(example.ids) for example in examples)
    return Batch(ids, targets, positions if packed else None, n_tokens)


def load_data(
    dataset: Mapping[str, Any],
    *,
    tokenizer: "Callable[[], PreTrainedTokenizerBase]",
    tokenizer_id: str,
    seed: int,
    batch: int,
    micro_batch: int,
) -> Data:
    """Return the tokenised data set, built on first use and then read from the cache.

    dataset: the keys of conf/dataset/*.yaml. tokenizer makes the tokenizer, and is called only if
    the tokens are not in the cache; tokenizer_id is another whenever the tokenizer is. seed: of
    the order of training examples. batch, micro_batch: examples per optimizer step and per forward
    pass. Says on standard error how much was cut at block_length.
    Raises: InputError for a bad value, rows that cannot be had, or rows that do not fit the keys.
    """
    _check(dataset)
    for key, value in (("batch", batch), ("micro_batch", micro_batch)):
        require(_whole(value) and value >= 1, key, value, "must be a whole number of at least 1")
    folder = cache_dir() / "tokens" / _request(dataset, tokenizer_id)
    with making(folder) as empty:
        if empty is not None:
            chosen = choose(find_source(dataset["source"]).load(dataset), dataset)
            words = tokenizer()
            for name, rows in zip(SPLITS, chosen, strict=True):
                made = tokenise(name, rows, dataset, words, tokenizer_id)
                _store(made, len(rows), empty / f"{name}.safetensors")
    (train, train_sha), (test, test_sha) = (_stored(folder / f"{n}.safetensors") for n in SPLITS)
    for name, split in zip(SPLITS, (train, test), strict=True):
        if split.n_truncated:
            print(
                f"{name}: {split.n_truncated} of {split.n_rows} rows are longer than "
                f"dataset.block_length={dataset['block_length']}: "
                f"{split.n_truncated_tokens} tokens cut off",
                file=sys.stderr,
            )
    fingerprint = hashlib.sha256(f"{train_sha}/{test_sha}".encode()).hexdigest()
    return Data(dataset["name"], train, test, fingerprint, seed, batch, micro_batch)


def _request(dataset: Mapping[str, Any], tokenizer_id: str) -> str:
    """Name what the tokens depend on, without loading rows or tokenizer."""
    content = {key: dataset[key] for key in KEYS if key not in ("name", "path", "replace")}
    content |= {
        "content": find_source(dataset["source"]).content_id(dataset),
        "replace": list((dataset["replace"] or {}).items()),  # a list: the order counts
        "tokenizer": tokenizer_id,
        "version": VERSION,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _check(dataset: Mapping[str, Any]) -> None:
    for key in KEYS:
        if key not in dataset:
            raise InputError(f"dataset.{key}: missing; see the comments in conf/dataset/bfcl.yaml")
    for key in dataset:
        require(key in KEYS, f"dataset.{key}", dataset[key], f"no such key; has {', '.join(KEYS)}")

    def check(key: str, ok: bool, allowed: str) -> None:
        require(ok, f"dataset.{key}", dataset[key], allowed)

    template, replace, length = (dataset[key] for key in ("template", "replace", "block_length"))
    check("template", template is None or isinstance(template, str), "must be text, or null")
    texts = replace is None or (
        isinstance(replace, Mapping)
        and all(isinstance(text, str) and text != "" for text in replace)
        and all(isinstance(text, str) for text in replace.values())
    )
    check("replace", texts, "must be null, or map text to the text that takes its place")
    check("loss_on", dataset["loss_on"] in ("all", "completion"), "must be all or completion")
    check("block_length", _whole(length) and length >= 2, "must be a whole number of at least 2")
    check("packing", isinstance(dataset["packing"], bool), "must be true or false")
    check("split_seed", _whole(dataset["split_seed"]), "must be a whole number")
    train, test = dataset["train_size"], dataset["test_size"]
    rows = "must be null (all), or a whole number of at least 1"
    check("train_size", train is None or (_whole(train) and train >= 1), rows)
    fraction = isinstance(test, float) and 0 < test < 1
    check(
        "test_size",
        test is None or fraction or (_whole(test) and test >= 1),
        f"{rows}, or a fraction between 0 and 1",
    )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _store(tokens: Tokens, n_rows: int, path: Path) -> None:
    flat = {"ids": tokens.ids, "targets": tokens.targets}
    if tokens.positions is not None:
        flat["positions"] = tokens.positions
    tensors = {
        name: torch.tensor([token for part in parts for token in part], dtype=torch.int32)
        for name, parts in flat.items()
    }
    counts = (n_rows, tokens.n_bytes, tokens.n_truncated, tokens.n_truncated_tokens)
    tensors["lengths"] = torch.tensor([len(part) for part in tokens.ids], dtype=torch.int32)
    tensors["counts"] = torch.tensor(counts, dtype=torch.int64)
    save_tensors(path, tensors, {"sha256": _sha256(tensors)})


def _stored(path: Path) -> tuple[Split, str]:
    """Read a split and its sha256. Raises: InputError if the file is not as it was written."""
    damaged = InputError(f"PEFTLAB_CACHE={cache_dir()}: {path} is damaged; delete its folder")
    try:
        with safe_open(path, framework="pt") as file:
            sha = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise damaged from error
    if sha is None or sha != _sha256(tensors):
        raise damaged
    lengths = tensors["lengths"].tolist()
    ids, targets = (tensors[name].split(lengths) for name in ("ids", "targets"))
    positions = [None] * len(lengths)
    if "positions" in tensors:
        positions = tensors["positions"].split(lengths)
    n_rows, n_bytes, n_truncated, n_truncated_tokens = tensors["counts"].tolist()
    split = Split(
        examples=[Example(*parts) for parts in zip(ids, targets, positions, strict=True)],
        n_rows=n_rows,
        n_targets=int((tensors["targets"] != IGNORE).sum()),
        n_bytes=n_bytes,
        n_truncated=n_truncated,
        n_truncated_tokens=n_truncated_tokens,
    )
    return split, sha


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        content = tensors[name].numpy().astype("<i8").tobytes()  # the same bytes on any machine
        digest.update(f"{name}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))


def _seed_of(seed: int, epoch: int) -> int:
    """Return 63 bits of (seed, epoch): a sum would give seed 1, epoch 0 the order of 0, 1."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

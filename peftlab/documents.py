"""Rows become documents: the template is filled, tokenised, and cut or packed.

A document is the template with the row's fields in it, then EOS, which is a target like any other.
With `loss_on: completion` the part before the template's last field is a prompt: it is tokenised
on its own, so that its ids are those a user gets who types it, and it is not scored. With
`loss_on: all` the text is tokenised in one piece. A field's text that contains the name of a
special token is tokenised as the tokenizer does by default, that is, as the special token.

A document of n + 1 tokens makes n positions: ids are its first n tokens, targets its last n. So the
first token is never a target (nothing predicts it) and EOS is never an input.
"""

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from peftlab.bits import IGNORE
from peftlab.errors import InputError, require
from peftlab.sources import Row, field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # seconds to import; a warm start needs none


class Template:
    r"""A string such as "Question: {question}\nAnswer:\n{answer}", cut at its fields."""

    def __init__(self, text: str, replace: Mapping[str, str]) -> None:
        """Raise InputError if `text` has no field, or more than plain {field} names in braces."""
        self.key = f"dataset.template={text!r}"
        self.replace = replace
        self.fields: list[tuple[str, str]] = []  # (text in front of the field, its name)
        allowed = "must hold {field} names, no more than a name in braces; {{ and }} are braces"
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as error:
            raise InputError(f"{self.key}: {allowed} ({error})") from error
        literal = ""
        for before, name, spec, conversion in parsed:
            literal += before  # an escaped brace ends a piece without a field
            if name is not None:
                plain = name != "" and not spec and not conversion and not set(name) & set(".[]{}")
                require(plain, "dataset.template", repr(text), allowed)
                self.fields.append((literal, name))
                literal = ""
        self.end = literal
        require(bool(self.fields), "dataset.template", repr(text), f"has no field: {allowed}")

    def fill(self, row: Row, where: str) -> tuple[str, str]:
        """Return (prompt, completion): the text before the last field, and from there on.

        Raises: InputError if the row lacks a field, or its value is neither text nor a number.
        """
        texts = [literal for literal, _ in self.fields]
        values = [self._value(row, name, where) for _, name in self.fields]
        before = [part for pair in zip(texts, values, strict=True) for part in pair][:-1]
        return "".join(before), values[-1] + self.end

    def _value(self, row: Row, name: str, where: str) -> str:
        value = str(field(row, name, self.key, where))
        for old, new in self.replace.items():
            value = value.replace(old, new)
        return value


def template_for(given: str | None, row: Row) -> str:
    """Return the template given or, if null, the one that the fields of the first row suggest."""
    if given is not None:
        return given
    if "text" in row:
        return "{text}"
    if "prompt" in row and "completion" in row:
        return "{prompt}{completion}"
    raise InputError(
        "dataset.template=None: needed unless rows have the field text, or prompt and completion; "
        f"these have {', '.join(row)}"
    )


class Tokens(NamedTuple):
    """A split as lists: one entry per example in the first three, and what they add up to."""

    ids: list[list[int]]
    targets: list[list[int]]  # IGNORE where nothing is scored
    positions: list[list[int]] | None  # with packing
    n_bytes: int  # UTF-8 bytes of the scored text, exact to a character where a row is cut; EOS: 0
    n_truncated: int  # rows
    n_truncated_tokens: int


def tokenise(
    split: str,
    rows: Sequence[tuple[int, Row]],
    dataset: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    tokenizer_id: str,
) -> Tokens:
    """Return the tokens of rows (index, row).

    Reads the keys template, replace, loss_on, block_length and packing, and expects them checked.
    Raises: InputError that names split and index of a row which does not fit, or the tokenizer
    if it has no EOS token.
    """
    template = Template(template_for(dataset["template"], rows[0][1]), dataset["replace"] or {})
    texts = [template.fill(row, f"{split} row {index}") for index, row in rows]
    if dataset["loss_on"] == "all":
        texts = [("", prompt + completion) for prompt, completion in texts]
    documents = _documents(texts, tokenizer, tokenizer_id)
    for (index, _), document in zip(rows, documents, strict=True):
        if not document.targets:
            raise InputError(f"{template.key}: {split} row {index} is empty, so it has no target")
    ids = [document.ids for document in documents]
    targets = [document.targets for document in documents]
    n_bytes = sum(document.n_bytes for document in documents)
    length = dataset["block_length"]
    if dataset["packing"]:
        return Tokens(*_pack(ids, targets, length), n_bytes, 0, 0)
    for (index, _), labels in zip(rows, targets, strict=True):
        if set(labels[:length]) == {IGNORE}:
            raise InputError(
                f"dataset.block_length={length}: {split} row {index} has {len(labels)} tokens, "
                "and all that would be scored is cut away"
            )
    cut = [labels[length:] for labels in targets if len(labels) > length]
    n_bytes -= sum(_n_bytes(tokenizer, labels[:-1]) for labels in cut)  # the last one is EOS
    return Tokens(
        ids=[tokens[:length] for tokens in ids],
        targets=[labels[:length] for labels in targets],
        positions=None,
        n_bytes=n_bytes,
        n_truncated=len(cut),
        n_truncated_tokens=sum(len(labels) for labels in cut),
    )


class _Document(NamedTuple):
    ids: list[int]
    targets: list[int]
    n_bytes: int


def _documents(
    texts: Sequence[tuple[str, str]], tokenizer: "PreTrainedTokenizerBase", tokenizer_id: str
) -> list[_Document]:
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise InputError(f"tokenizer={tokenizer_id}: has no EOS token, which must end every row")
    start = _start(tokenizer)
    prompts, completions = (_encode(tokenizer, part) for part in zip(*texts, strict=True))
    documents = []
    for (_, text), prompt, completion in zip(texts, prompts, completions, strict=True):
        before = start + prompt
        tokens = [*before, *completion, eos]
        n_unscored = max(1, len(before))
        n_bytes = len(text.encode())
        if not before:  # then the first token of the text itself is no target
            n_bytes -= _n_bytes(tokenizer, completion[:1])
        targets = [IGNORE] * (n_unscored - 1) + tokens[n_unscored:]
        documents.append(_Document(tokens[:-1], targets, n_bytes))
    return documents


def _start(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the special tokens that the tokenizer puts in front of a text: [BOS], or none.

    What it puts behind (some append EOS) would stand between prompt and completion.
    """
    bare = _encode(tokenizer, ["a"])[0]
    full = tokenizer(["a"])["input_ids"][0]
    return next(full[:at] for at in range(len(full) + 1) if full[at : at + len(bare)] == bare)


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _n_bytes(tokenizer: "PreTrainedTokenizerBase", tokens: list[int]) -> int:
    text = cast(str, tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
    return len(text.encode())


def _pack(
    ids: list[list[int]], targets: list[list[int]], length: int
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Join documents and cut them into blocks of `length`; the last block may be shorter.

    A document that spans blocks goes on in the next one, its positions from 0 again. No target is
    lost: the last position of a block predicts the first token of the next. A block without a
    target is left out.
    """
    positions: list[int] = []
    for document in ids:
        first = len(positions)
        end = first + len(document)
        positions += (at - max(first, at - at % length) for at in range(first, end))
    flat = [[token for part in parts for token in part] for parts in (ids, targets)]
    streams = (*flat, positions)
    starts = [
        at for at in range(0, len(positions), length) if set(flat[1][at : at + length]) != {IGNORE}
    ]
    blocks = ([stream[at : at + length] for at in starts] for stream in streams)
    packed_ids, packed_targets, packed_positions = blocks
    return packed_ids, packed_targets, packed_positions

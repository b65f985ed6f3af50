"""The lowest decoder blocks, computed once per row where nothing in or below them is trained.

A row gives the same states there in every epoch. They are kept, and the blocks are not run again:
not in training, and not when a split is evaluated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftlab.data import Batch, Data, pad
from peftlab.errors import InputError
from peftlab.method import attached
from peftlab.show import warn
from peftlab.sites import blocks_of, touched

# Bytes of all states. A constant, and not what is free just now: a run that goes on later, beside
# other programs, has to decide as it did before, or its last bits would be others.
LIMIT = 2**30
TOLERANCE = 1e-2  # of the largest number; a state that is not all a block hands on is far above

Loss = Callable[[PreTrainedModel, Batch], Tensor]


class Reuse:
    """The states [T, d] behind the first `n_blocks` decoder blocks, by row, on the CPU."""

    def __init__(
        self, net: PreTrainedModel, n_blocks: int, batches: Sequence[Batch], *, autocast: bool
    ) -> None:
        started = time.perf_counter()
        self.n_blocks = n_blocks
        self.lower = blocks_of(net)[:n_blocks]
        self.rows: dict[bytes, Tensor] = {}
        for batch in batches:
            states = _states(net, n_blocks, batch, autocast=autocast).cpu()
            for key, row in zip(_keys(batch), states, strict=True):
                # Of rows that differ in what may be padding only, the longest serves all.
                if key not in self.rows or len(row) > len(self.rows[key]):
                    self.rows[key] = row
        self.seconds = time.perf_counter() - started

    def feeding(self, loss: Loss) -> Loss:
        """Return `loss` without the lower blocks; a batch with an unknown row is computed whole."""

        def fed(net: PreTrainedModel, batch: Batch) -> Tensor:
            states = self.states(batch)
            if states is None:
                return loss(net, batch)
            with _instead(self.lower, lambda *args, **kwargs: states):
                return loss(net, batch)

        return fed

    def states(self, batch: Batch) -> Tensor | None:
        """Return the states [B, T, d] of a batch, on its device, 0 where they are not known.

        That is padding, which no token sees. None if a row is unknown.
        """
        found = [self.rows.get(key) for key in _keys(batch)]
        known = [row for row in found if row is not None]
        if len(known) < len(found):
            return None
        device, (size, length) = batch.ids.device, batch.ids.shape
        shape = (size, length, known[0].shape[-1])
        pinned = device.type == "cuda"
        states = torch.zeros(shape, dtype=known[0].dtype, pin_memory=pinned)
        for place, row in zip(states, known, strict=True):
            place[: len(row)] = row[:length]
        return states.to(device, non_blocking=pinned)


def reuse_of(net: PreTrainedModel, data: Data, *, autocast: bool) -> Reuse | None:
    """Compute what is the same in every epoch of training `net`, a method attached, on `data`.

    autocast: multiply in bf16. Returns None if nothing is, or if it is more than LIMIT.
    """
    try:
        blocks = blocks_of(net)
    except InputError:  # a model without one list of blocks trains as well
        return None
    probe = pad(data.train.examples[:1])
    n_blocks, bytes_per_token = idle_blocks(net, probe, autocast=autocast)
    if not n_blocks:
        return None
    batches = [batch for split in (data.train, data.test) for batch in data.batches(split)]
    size = sum(batch.ids.numel() for batch in batches) * bytes_per_token
    what = f"the {n_blocks} lowest of {len(blocks)} decoder blocks"
    if size > LIMIT:
        much = f"{size / 2**30:.1f} GiB, and at most {LIMIT / 2**30:.0f} is kept"
        warn(f"{what} are run again in every epoch: their states are {much}")
        return None
    warn(f"computing {what} once: nothing is trained there ({size / 2**20:.0f} MiB are kept) ...")
    return Reuse(net, n_blocks, batches, autocast=autocast)


def idle_blocks(net: PreTrainedModel, batch: Batch, *, autocast: bool) -> tuple[int, int]:
    """Return how many of the first decoder blocks give the same in each epoch, and bytes per token.

    Nothing in or below them is trained, hooked or replaced, nothing draws random numbers, and the
    state that they hand on is all that the blocks above know of them. Looked up in a forward pass
    of `batch` in train mode, which leaves no trace.
    """
    blocks = blocks_of(net)
    inside = {module for block in blocks for module in block.modules()}
    outside = set(net.modules()) - inside - set(attached(net).modules())
    if any(touched(module) for module in outside):
        return 0, 0
    device = next(net.parameters()).device
    frozen = [not any(p.requires_grad for p in block.parameters()) for block in blocks]
    untouched = [not any(touched(module) for module in block.modules()) for block in blocks]
    if not (frozen[0] and untouched[0]):  # as with most methods: no need to look
        return 0, 0
    start = _random_state(device)
    idle: list[bool] = []
    outputs: list[Tensor] = []

    def look(block: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        plain = isinstance(output, Tensor) and not output.requires_grad
        drawn = not torch.equal(start, _random_state(device))
        idle.append(plain and not drawn)
        outputs.append(output if isinstance(output, Tensor) else output[0])

    handles = [block.register_forward_hook(look) for block in blocks]
    training = net.training
    net.train()
    try:
        whole = _last_hidden(net, batch, autocast=autocast)
        found = [all(facts) for facts in zip(idle, frozen, untouched, strict=True)]
        n_blocks = found.index(False) if False in found else len(blocks)
        if not n_blocks:
            return 0, 0
        state = outputs[n_blocks - 1]
        with _instead(blocks[:n_blocks], lambda *args, **kwargs: state):
            fed = _last_hidden(net, batch, autocast=autocast)
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()
    if (fed - whole).abs().max() > TOLERANCE * whole.abs().max():
        return 0, 0
    return n_blocks, state.shape[-1] * state.element_size()


def _random_state(device: torch.device) -> Tensor:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _last_hidden(net: PreTrainedModel, batch: Batch, *, autocast: bool) -> Tensor:
    """Return the last hidden state, float32; the random numbers drawn are not missed afterwards."""
    device = next(net.parameters()).device
    batch = batch.to(device)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, torch.bfloat16, enabled=autocast),
    ):
        output = net.base_model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)
    return output.last_hidden_state.detach().float()


@torch.no_grad()
def _states(net: PreTrainedModel, n_blocks: int, batch: Batch, *, autocast: bool) -> Tensor:
    """Return the states [B, T, d] behind the first blocks, without running the others."""
    blocks = blocks_of(net)
    found: list[Tensor] = []
    handle = blocks[n_blocks - 1].register_forward_hook(lambda *call: found.append(call[-1]))
    try:
        with _instead(blocks[n_blocks:], _given):
            _last_hidden(net, batch, autocast=autocast)
    finally:
        handle.remove()
    return found[0]


def _given(*args: Tensor, **kwargs: Tensor) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def _instead(blocks: Sequence[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Call `forward` inside, instead of each of `blocks`, compiled or not."""
    before = [(block, block._compiled_call_impl, vars(block).get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.forward, block._compiled_call_impl = forward, None
        yield
    finally:
        for block, compiled, own in before:
            del block.forward
            block._compiled_call_impl = compiled
            if own is not None:
                block.forward = own


def _keys(batch: Batch) -> list[bytes]:
    """Name each row by its ids, and its positions where it has some, but for padding at its end.

    What could be padding, id 0 at position 0 or without one, is never part of the name: what comes
    out there depends on what is before it only.
    """
    ids = batch.ids.cpu()
    given = ids[None] if batch.positions is None else torch.stack([ids, batch.positions.cpu()])
    ends = torch.arange(1, ids.shape[1] + 1)
    lengths = (given.any(0) * ends).amax(1).tolist()
    return [given[:, row, :n].numpy().tobytes() for row, n in enumerate(lengths)]

"""The loop: three epochs over the train split, as a generator of rows that writes nothing.

All that changes lives in the trained tensors, the optimizer, torch's random state and `Progress`,
and is consistent at every yield: saving those four then, and restoring them later, continues the
run as if it had never stopped.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftlab.bits import IGNORE, Tally, linear_nll, nll
from peftlab.data import Batch, Data, Split
from peftlab.flops import FlopCounter
from peftlab.method import Method, attached, trainable
from peftlab.optim import in_backward


class Diverged(Exception):
    """The run cannot go on: a loss or gradient that is not finite, or a loss far above the base."""


class Stopped(Exception):
    """Someone asked the run to stop; its progress is consistent."""


@dataclass
class Row:
    """One line of rows.jsonl: a training step, or an evaluation of a split."""

    step: int  # optimizer steps done
    tokens: int  # tokens trained on so far, padding not counted
    epoch: int  # epochs done at an evaluation; the running one, from 1, at a step
    phase: str  # "step": the loss of a batch before its update; "eval": a whole split
    split: str  # "train" or "test"
    bits_per_token: float
    targets: int
    lr: float | None = None
    grad_norm: float | None = None


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    flops: int = 0  # of the first step, forward and backward
    online: Tally = field(default_factory=Tally)  # steps of the epoch so far
    train: list[Tally] = field(default_factory=list)  # whole train split: before, after
    test: list[Tally] = field(default_factory=list)  # whole test split: before, after each epoch
    epochs: list[dict] = field(default_factory=list)

    @property
    def running_bits_per_token(self) -> float:
        """The online loss of the epoch so far, or of the last one before a new one has begun."""
        if self.online.targets:
            return self.online.bits_per_token
        return self.epochs[-1]["train_bits_per_token"]


def nats_of(net: PreTrainedModel, batch: Batch) -> Tensor:
    """Sum of nats over the batch's targets, differentiable, without ever keeping the logits."""
    hidden = net.base_model(
        input_ids=batch.ids, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    head = cast(nn.Linear, net.get_output_embeddings())  # Backbone.linear_logits: there is one
    return linear_nll(hidden, head.weight, head.bias, batch.targets)


def nats_of_logits(net: PreTrainedModel, batch: Batch) -> Tensor:
    """`nats_of` for a model that does more to its logits than a linear head; the plain form."""
    out = net(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)
    return nll(out.logits, batch.targets)


def logits_of(net: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits [targets, V] in float32, differentiable, at the positions that have a target."""
    out = net(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)
    return out.logits[batch.targets != IGNORE].float()


def evaluate(
    net: PreTrainedModel,
    batches: Sequence[Batch],
    loss: Callable[[PreTrainedModel, Batch], Tensor],
    *,
    autocast: bool,
    stop: Callable[[], bool] = lambda: False,
) -> Tally:
    """Sum nats and targets over `batches` in eval mode. Raises: Stopped when `stop` says so."""
    net.eval()
    device = next(net.parameters()).device
    tally = Tally()
    with torch.no_grad():
        for batch in batches:
            if stop():
                raise Stopped
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                nats = loss(net, batch.to(device))
            tally.add(nats.item(), batch.n_targets)
    return tally


def fit(
    net: PreTrainedModel,
    data: Data,
    optimizer: torch.optim.Optimizer,
    factor: Callable[[int], float],
    progress: Progress,
    *,
    base: tuple[Tally, Tally],
    loss: Callable[[PreTrainedModel, Batch], Tensor],
    epochs: int,
    clip: float | None,
    autocast: bool,
    stop: Callable[[], bool],
) -> Iterator[Row]:
    """Train on from `progress`; yield a Row per optimizer step and per evaluated split.

    base: the frozen model's tallies of train and test split. loss: nats_of, or another form of
    it. factor: of each group's peak lr, by step. stop: asked between steps and between batches of
    an evaluation. autocast: multiply in bf16.
    Raises: Diverged; Stopped, with `progress` as it was at the last yield.
    """
    params = [p for _, p in trainable(net)]
    device = params[0].device
    method = attached(net)
    peak = [group["lr"] for group in optimizer.param_groups]
    # Not on a GPU, where the price of a pass was never measured; and an update within backward
    # needs the whole step in one.
    split = device.type == "cpu" and not in_backward(optimizer)

    def nats(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return loss(net, batch.to(device))

    def logits(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return logits_of(net, batch.to(device))

    def whole(split: Split) -> Tally:
        return evaluate(net, data.batches(split), loss, autocast=autocast, stop=stop)

    def scored(split: str, tally: Tally) -> Row:
        _check_finite(tally.nats, f"loss of the {split} split")
        bits = tally.bits_per_token
        return Row(progress.step, progress.tokens, done, "eval", split, bits, tally.targets)

    while True:
        done = progress.step // data.n_steps
        _check_level(progress)
        # Before the first step, and once after each epoch.
        if len(progress.test) <= done and progress.step % data.n_steps == 0:
            if done in (0, epochs) and len(progress.train) <= (done == epochs):
                train = whole(data.train) if done else base[0]
                progress.train.append(train)
                yield scored("train", train)
            test = whole(data.test) if done else base[1]
            if done:
                progress.epochs[-1]["test_bits_per_token"] = test.bits_per_token
            progress.test.append(test)
            yield scored("test", test)
        if done == epochs:
            return
        net.train()
        for micro_batches in data.steps(done, split=split)[progress.step % data.n_steps :]:
            if stop():
                raise Stopped
            started = time.perf_counter()
            for group, lr in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = lr * factor(progress.step)
            with _counting() if progress.step == 0 else nullcontext() as counter:
                step = _accumulate(method, nats, logits, micro_batches)
            _check_finite(step.nats, "loss")
            norm = _gradient_norm(optimizer, params)
            _check_finite(norm.item(), "gradient")
            if clip is not None:
                nn.utils.clip_grads_with_norm_(params, clip, norm)
            optimizer.step()
            method.after_step(progress.step + 1, epochs * data.n_steps)
            optimizer.zero_grad(set_to_none=True)
            if counter is not None:
                progress.flops = counter.total
            progress.step += 1
            progress.tokens += sum(batch.n_tokens for batch in micro_batches)
            progress.online.add(step.nats, step.targets)
            progress.train_seconds += time.perf_counter() - started
            if progress.step % data.n_steps == 0:
                _end_epoch(progress)
            yield Row(
                progress.step,
                progress.tokens,
                done + 1,
                "step",
                "train",
                step.bits_per_token,
                step.targets,
                lr=optimizer.param_groups[0]["lr"],
                grad_norm=norm.item(),
            )


@contextmanager
def _counting() -> Iterator[FlopCounter]:
    """Count the operations of a step, which compiled blocks would hide."""
    with torch.compiler.set_stance("force_eager"), FlopCounter() as counter:
        yield counter


def _accumulate(
    method: Method,
    nats: Callable[[Batch], Tensor],
    logits: Callable[[Batch], Tensor],
    micro_batches: list[Batch],
) -> Tally:
    """Backward through all micro-batches, each weighted by its targets: the full batch's mean."""
    penalty = method.penalty()
    if penalty is not None:
        penalty.backward()
    n_targets = sum(batch.n_targets for batch in micro_batches)
    tally = Tally()
    for batch in micro_batches:
        objective, lost = method.objective(nats, logits, batch)
        (objective / n_targets).backward()
        tally.add(lost.item(), batch.n_targets)
    return tally


def _gradient_norm(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter]) -> Tensor:
    """Global norm of the step's gradients."""
    if in_backward(optimizer):
        return optimizer.gradient_norm()
    return nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])


def _end_epoch(progress: Progress) -> None:
    seconds = progress.train_seconds - sum(epoch["seconds"] for epoch in progress.epochs)
    progress.epochs.append(
        {
            "epoch": len(progress.epochs) + 1,
            "train_bits_per_token": progress.online.bits_per_token,
            "test_bits_per_token": None,  # filled by the evaluation that follows
            "seconds": seconds,
        }
    )
    progress.online = Tally()


def _check_level(progress: Progress) -> None:
    """Raise Diverged if the last epoch's online loss is above twice the base model's."""
    if progress.epochs:
        last, base = progress.epochs[-1], progress.train[0].bits_per_token
        if last["train_bits_per_token"] > 2 * base:
            raise Diverged(
                f"train loss of epoch {last['epoch']} is {last['train_bits_per_token']:.3f} bits "
                f"per token, above twice the base model's {base:.3f}"
            )


def _check_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise Diverged(f"{what} is {value}")

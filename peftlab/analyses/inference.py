"""What the adapter costs at inference: ms per token beside the model, and merged into it.

    decode     one token at a time behind a prompt, with a cache, the most likely one each time
    prefill    the prompt in one pass
    extra      floating-point operations per token beyond those of the frozen model
    positions  keys and values that every token has to look at beside the text's

The frozen model, the adapted and the merged one take turns, so that whatever slows the machine
slows all; told are the median over rounds and the quartiles. The merged model is stored in the
type of the frozen weights.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1 (no latency once merged), and table 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from peftlab.analysis import Analysis, Axis, Cell, Column, Figure, Option, bars, labels
from peftlab.errors import require
from peftlab.flops import FlopCounter
from peftlab.method import NotMergeable, attached
from peftlab.parts import base_of
from peftlab.recorded import Record, restore
from peftlab.sites import most_positions

OPTIONS = (
    Option("prompt", int, 64, "tokens of the prompt"),
    Option("tokens", int, 32, "tokens to generate behind it"),
    Option("rounds", int, 9, "how often each model takes its turn, after one that does not count"),
)
FORMS = ("frozen", "adapted", "merged")
NOTES = (
    "to frozen: the median over rounds of the ratio. Runs are measured one after another, so "
    "compare them by it. A difference within the quartiles is none.",
    "One sequence at a time, on this machine: another one, a batch or a kernel may rank methods "
    "differently.",
    "adapted: the method acts by Python hooks, whose time counts here and would be less in a "
    "runtime made for it; operations do not depend on that.",
    "positions: keys and values beside the text's, which every token looks at.",
)


class Timing(NamedTuple):
    """One model."""

    decode: tuple[float, ...]  # ms per token, by round; empty where there is no cache
    prefill: tuple[float, ...]  # ms per token of the prompt, by round
    decode_flops: int | None  # of the last token that is generated
    prefill_flops: float  # per token of the prompt


class Costs(NamedTuple):
    """One run."""

    timings: dict[str, Timing]  # by form
    positions: int
    cached: bool


def clocked(
    turns: Mapping[str, Callable[[], tuple[float, ...]]], rounds: int
) -> dict[str, list[tuple[float, ...]]]:
    """Let each take its turn in every round, after one that does not count."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            times = turn()
            if number:
                found[name].append(times)
    return found


def generate(net: PreTrainedModel, prompt: Tensor, tokens: int) -> tuple[float, float]:
    """Generate behind prompt [1, T]; return ms per token of the prompt and of those generated."""
    cache = DynamicCache(config=net.config)
    started = _now(net)
    logits = net(input_ids=prompt, past_key_values=cache, use_cache=True).logits
    between = _now(net)
    for _ in range(tokens):
        token = logits[:, -1:].argmax(-1)
        logits = net(input_ids=token, past_key_values=cache, use_cache=True).logits
    ended = _now(net)
    return 1e3 * (between - started) / prompt.shape[1], 1e3 * (ended - between) / tokens


def prefill(net: PreTrainedModel, prompt: Tensor) -> tuple[float]:
    """Pass the prompt [1, T] once, without a cache; return ms per token."""
    started = _now(net)
    net(input_ids=prompt, use_cache=False)
    return (1e3 * (_now(net) - started) / prompt.shape[1],)


def operations(
    net: PreTrainedModel, prompt: Tensor, tokens: int, *, cached: bool
) -> tuple[float, int | None]:
    """Count operations per token of the prompt, and of the last of `tokens` that follow it."""
    T = prompt.shape[1]
    if not cached:
        with FlopCounter() as counter:
            net(input_ids=prompt, use_cache=False)
        return counter.total / T, None
    cache = DynamicCache(config=net.config)
    with FlopCounter() as counter:
        net(input_ids=prompt, past_key_values=cache, use_cache=True)
    if tokens > 1:  # what is generated does not matter, only how much
        more = prompt[:, :1].expand(1, tokens - 1)
        net(input_ids=more, past_key_values=cache, use_cache=True)
    with FlopCounter() as last:
        net(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True)
    return counter.total / T, last.total


@torch.no_grad()
def costs(run: Record, *, prompt: int, tokens: int, rounds: int) -> Costs:
    """Measure a run: frozen, adapted and, where the method merges, merged.

    All are held at once.
    """
    here = {**run.config, "model": {**run.config["model"], "device": "auto"}}
    net = restore(run).net
    method = attached(net)
    models = {"frozen": base_of(here).net, "adapted": net, "merged": _merged(run)}
    limit = most_positions(net)
    room = limit - tokens - method.n_positions
    told = f"at most {room}, as {run.folder}'s model has {limit} positions"
    require(prompt <= room, "--prompt", prompt, told)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(net.config.get_text_config().vocab_size, (1, prompt), generator=generator)
    ids = ids.to(net.device)
    autocast = torch.autocast(
        net.device.type, torch.bfloat16, enabled=run.config["precision"] == "bf16"
    )

    def turn(which: PreTrainedModel) -> tuple[float, ...]:
        with autocast:
            return generate(which, ids, tokens) if method.cached else prefill(which, ids)

    there = {form: model for form, model in models.items() if model is not None}
    times = clocked({form: partial(turn, model) for form, model in there.items()}, rounds)
    timings = {}
    for form, model in there.items():
        with autocast:
            of_prompt, of_last = operations(model, ids, tokens, cached=method.cached)
        first, *second = zip(*times[form], strict=True)
        timings[form] = Timing(second[0] if second else (), first, of_last, of_prompt)
    return Costs(timings, method.n_positions, method.cached)


def analyse(runs: Sequence[Record], *, prompt: int, tokens: int, rounds: int) -> Analysis:
    """Measure every run. Raises: InputError if the model has no room for so many tokens."""
    for name, value, least in (("prompt", prompt, 2), ("tokens", tokens, 1), ("rounds", rounds, 2)):
        require(value >= least, f"--{name}", value, f"a whole number from {least}")
    names = labels(runs)
    found = [costs(run, prompt=prompt, tokens=tokens, rounds=rounds) for run in runs]
    table: list[tuple[Cell, ...]] = []
    for name, own in zip(names, found, strict=True):
        frozen = own.timings["frozen"]
        for form, timing in own.timings.items():
            extra = None
            if timing.decode_flops is not None and frozen.decode_flops is not None:
                extra = (timing.decode_flops - frozen.decode_flops) / 1e6
            table.append(
                (
                    *(name, form, *_spread(timing.decode), _ratio(timing.decode, frozen.decode)),
                    *_spread(timing.prefill),
                    extra,
                    (timing.prefill_flops - frozen.prefill_flops) / 1e6,
                    own.positions if form == "adapted" else 0,
                )
            )
    side = [name for name, own in zip(names, found, strict=True) if not own.cached]
    without = (f"No decode for {', '.join(side)}: the method has no key-value cache.",)
    apart = [name for name, own in zip(names, found, strict=True) if "merged" not in own.timings]
    unmerged = (f"No merged model for {', '.join(apart)}: the method does not merge.",)
    return Analysis(
        title=f"ms per token: {tokens} tokens behind a prompt of {prompt}, {rounds} rounds",
        columns=(
            *(Column("run"), Column("model")),
            *(Column("decode", "ms/token"), Column("decode, quartiles", "ms"), Column("to frozen")),
            *(Column("prefill", "ms/token"), Column("prefill, quartiles", "ms")),
            Column("extra, decode", "MFLOP"),
            Column("extra, prefill", "MFLOP"),
            Column("positions"),
        ),
        rows=tuple(table),
        notes=(
            *(without if side else ()),
            *(unmerged if apart else ()),
            f"Threads of torch: {torch.get_num_threads()}.",
            *NOTES,
        ),
        figures=(
            Figure(
                title="Time per generated token",
                caption=f"Median of {rounds} rounds, behind {prompt} tokens. Runs are measured one "
                "after another: the frozen bars are one model, and differ as the machine does.",
                x=Axis("run", "category"),
                y=Axis("ms per token"),
                traces=tuple(bars(form, *_medians(form, names, found)) for form in FORMS),
            ),
            Figure(
                title="Time per generated token, to that of the frozen model",
                caption=f"Median over {rounds} rounds of the ratio; 1: it costs nothing.",
                x=Axis("run", "category"),
                y=Axis("times the frozen model's"),
                traces=tuple(bars(form, *_ratios(form, names, found)) for form in FORMS[1:]),
            ),
        ),
    )


def _medians(
    form: str, names: Sequence[str], found: Sequence[Costs]
) -> tuple[list[Cell], list[Cell]]:
    own = [
        (name, median(run.timings[form].decode))
        for name, run in zip(names, found, strict=True)
        if form in run.timings and run.cached
    ]
    return [name for name, _ in own], [time for _, time in own]


def _ratios(
    form: str, names: Sequence[str], found: Sequence[Costs]
) -> tuple[list[Cell], list[Cell]]:
    own = [
        (name, _ratio(run.timings[form].decode, run.timings["frozen"].decode))
        for name, run in zip(names, found, strict=True)
        if form in run.timings and run.cached
    ]
    return [name for name, _ in own], [ratio for _, ratio in own]


def _spread(times: Sequence[float]) -> tuple[Cell, Cell]:
    """Return the median, and the quartiles as text."""
    if not times:
        return None, None
    low, middle, high = quantiles(times, n=4, method="inclusive")
    return middle, f"{low:.3g}..{high:.3g}"


def _ratio(times: Sequence[float], frozen: Sequence[float]) -> float | None:
    """Return the median of the ratio, round by round."""
    return median(a / b for a, b in zip(times, frozen, strict=True)) if times else None


def _merged(run: Record) -> PreTrainedModel | None:
    net = restore(run).net
    try:
        attached(net).merge(net)
    except NotMergeable:
        return None
    return net


def _now(net: nn.Module) -> float:
    if next(net.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()

"""Measure training steps against Hugging Face peft, and each other, in one run.

    python scripts/bench.py steps     ratios of training steps, memory, two processes side by side
    python scripts/bench.py growth    tokens/s and memory against batch, length, rank, layers
    python scripts/bench.py methods   steps of other methods, in LoRA's; DoRA also of Hugging Face
    python scripts/bench.py starts    seconds until the first step of `peftlab train`
    python scripts/bench.py losses    final losses in bf16 and in float32, of the default job
    python scripts/bench.py study     a whole study against the stock stack (bench_study.py)

Each contender is a process of its own, warmed up first; then they take turns, A B A B, two steps
at a time, and only one of them computes, so that drift of the machine hits all alike. `steps` does
that with fresh processes several times, as one process can be a tenth slower than the next for as
long as it lives. Prints tables; --json FILE keeps the raw seconds. Nothing else should run: a busy
core spoils every figure. Where the processor does not multiply bf16, which would take some five
times as long as float32, all is measured in float32 alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

ROWS, LENGTH, RANK = 8, 128, 8
CORES = os.cpu_count() or 1
COMMANDS = ("starts", "losses", "study")  # what measures whole commands, not steps
GIB = 2**30


# --- in the process of a contender


def contend(spec: dict[str, Any]) -> None:
    """Build what `spec` describes, then do a step for each line `go` on stdin; tell its time."""
    if spec["stack"] != "peft":  # whose process is as its user would have it
        from peftlab.allocator import keep_memory  # and with it how threads wait

        keep_memory()  # as the command does
    import torch

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    build = {"peftlab": _ours, "peft": _peft, "matmul": _matmuls}[spec["stack"]]
    step = build(spec)
    started = time.perf_counter()
    step()
    print(json.dumps({"first": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        if line.strip() == "go":
            started, cpu = time.perf_counter(), time.process_time()
            step()
            taken = {"step": time.perf_counter() - started, "cpu": time.process_time() - cpu}
            print(json.dumps(taken), flush=True)
        else:
            status = Path("/proc/self/status").read_text()
            peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]
            print(json.dumps({"peak": peak}), flush=True)


def _batch(spec: dict[str, Any]):
    import torch

    shape = (spec.get("rows", ROWS), spec.get("length", LENGTH) + 1)
    return torch.randint(1000, 40_000, shape)


def _ours(spec: dict[str, Any]):
    import hydra
    import torch

    from peftlab.backbone import load_backbone
    from peftlab.compiled import compile_blocks
    from peftlab.config import resolve
    from peftlab.data import Batch
    from peftlab.method import attached, trainable
    from peftlab.parts import build_method, build_optimizer
    from peftlab.train import CONF

    words = [f"method={spec['method']}", f"precision={spec['precision']}", *spec["overrides"]]
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        config = resolve(hydra.compose("config", words))
    backbone = load_backbone(
        config["model"], precision=config["precision"], block_length=spec.get("length", LENGTH)
    )
    net = backbone.net
    if layers := spec.get("layers"):
        net.model.layers = net.model.layers[:layers]
        net.config.num_hidden_layers = layers
    method = build_method(config["method"], net, backbone.kinds)
    method.read(backbone.encode)
    method.attach(net)
    net.train()
    params = [p for _, p in trainable(net)]
    optimizer = build_optimizer(config["optimizer"], params)
    if spec["compile"]:
        compile_blocks(net)
    ids = _batch(spec)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, ids[:, 1:].numel())
    autocast = config["precision"] == "bf16"

    def nats(batch: Batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return backbone.loss(net, batch)

    def step() -> None:
        objective, _ = attached(net).objective(nats, nats, batch)
        (objective / batch.n_tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _peft(spec: dict[str, Any]):
    import peft
    import torch
    import yaml
    from transformers import AutoModelForCausalLM

    from peftlab.backbone import locate
    from peftlab.config import HOME

    model = yaml.safe_load((HOME / "conf/model/smollm2.yaml").read_text())
    net = AutoModelForCausalLM.from_pretrained(locate(model)[0], dtype=torch.float32)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules="all-linear",
        use_dora=spec["method"] == "dora",
        task_type="CAUSAL_LM",
    )
    net = peft.get_peft_model(net, config).train()
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    ids = _batch(spec)[:, :-1].contiguous()
    autocast = spec["precision"] == "bf16"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = net(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _matmuls(spec: dict[str, Any]):
    """Only the frozen layers' products, forward and for the input's gradient: the limit."""
    import torch
    import yaml
    from transformers import AutoConfig

    from peftlab.backbone import locate
    from peftlab.config import HOME

    folder = locate(yaml.safe_load((HOME / "conf/model/smollm2.yaml").read_text()))[0]
    c = AutoConfig.from_pretrained(folder)
    kv = c.num_key_value_heads * (c.hidden_size // c.num_attention_heads)
    d, wide = c.hidden_size, c.intermediate_size
    block = [(d, d), (d, kv), (d, kv), (d, d), (d, wide), (d, wide), (wide, d)]
    shapes = block * c.num_hidden_layers + [(d, c.vocab_size)]
    dtype = torch.bfloat16 if spec["precision"] == "bf16" else torch.float32
    weights = [torch.randn(o, i).to(dtype) for i, o in shapes]
    tokens = spec.get("rows", ROWS) * spec.get("length", LENGTH)
    inputs = {n: torch.randn(tokens, n).to(dtype) for shape in shapes for n in shape}

    def step() -> None:
        for W in weights:
            torch.matmul(inputs[W.shape[1]], W.T)
        for W in reversed(weights):
            torch.matmul(inputs[W.shape[0]], W)

    return step


# --- in the process that measures


@cache
def precision() -> str:
    """Return what `precision: auto` is here."""
    import torch

    from peftlab.backbone import fast_bf16

    return "bf16" if fast_bf16(torch.device("cpu")) else "fp32"


class Contender:
    """A warm process that does a step when told to."""

    def __init__(self, label: str, **spec: Any) -> None:
        defaults = {"stack": "peftlab", "method": "lora", "compile": False}
        defaults |= {"precision": precision()}
        self.label = label
        self.spec = defaults | {"threads": CORES, "overrides": []} | spec
        self.seconds: list[float] = []
        self.cpu: list[float] = []  # of all threads: what other machines on the host do not touch
        self.peak = 0

    def begin(self) -> Contender:
        """Start the process and wait until it is warm."""
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.spec["threads"]),
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("GOMP_SPINCOUNT", None)  # which peftlab has set here, for itself alone
        words = [sys.executable, __file__, "contend", json.dumps(self.spec)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()
        return self

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.label}: ended with exit code {self.process.wait()}")
        return json.loads(line)

    def _tell(self, word: str) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self._read()

    def steps(self, n: int) -> float:
        """Do n steps; return their seconds, all in all."""
        taken = [self._tell("go") for _ in range(n)]
        self.seconds += [step["step"] for step in taken]
        self.cpu += [step["cpu"] for step in taken]
        return sum(step["step"] for step in taken)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.spec.get("rows", ROWS) * self.spec.get("length", LENGTH)

    @property
    def speed(self) -> float:
        """Tokens/s: the median over steps."""
        return self.tokens / statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        """The quickest and the slowest step, in seconds."""
        return f"{min(self.seconds):.2f}..{max(self.seconds):.2f}"

    def close(self) -> None:
        """Read the peak of resident memory and end the process."""
        self.peak = max(self.peak, int(self._tell("peak")["peak"]))
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def alternate(contenders: list[Contender], rounds: int, starts: int = 1) -> None:
    """Let the contenders take turns, two steps each, in each of so many processes of theirs."""
    for _ in range(starts):
        for contender in contenders:
            contender.begin()
        for _ in range(rounds):
            for contender in contenders:
                contender.steps(2)
        for contender in contenders:
            contender.close()


def side_by_side(specs: list[dict[str, Any]], n: int) -> tuple[float, list[Contender]]:
    """Let processes step at the same time; return their tokens/s together."""
    contenders = [Contender("side by side", **spec).begin() for spec in specs]
    with ThreadPoolExecutor(len(contenders)) as pool:
        list(pool.map(lambda c: c.steps(1), contenders))
        started = time.perf_counter()
        list(pool.map(lambda c: c.steps(n), contenders))
        seconds = time.perf_counter() - started
    for contender in contenders:
        contender.close()
    return sum(c.tokens for c in contenders) * n / seconds, contenders


def steps(rounds: int, starts: int) -> dict[str, Any]:
    """Measure the ratios of training steps."""
    print(f"\n## Steps of LoRA, r = {RANK}, on all linear layers; {ROWS} x {LENGTH} tokens\n")
    fp32 = Contender("HF peft, fp32", stack="peft", precision="fp32")
    bf16 = Contender("HF peft, bf16 autocast", stack="peft")
    plain, fast = Contender("peftlab, bf16"), Contender("peftlab, bf16, compile", compile=True)
    ours32 = Contender("peftlab, fp32", precision="fp32")
    fast32 = Contender("peftlab, fp32, compile", precision="fp32", compile=True)
    limit = Contender(f"matmuls alone, {precision()} (the limit)", stack="matmul")
    in_bf16 = [bf16, plain, fast] if precision() == "bf16" else []
    everyone = [fp32, *in_bf16, ours32, fast32, limit]
    alternate(everyone, rounds, starts)
    best = min([fp32, *in_bf16[:1]], key=lambda c: statistics.median(c.seconds))
    print(
        "| contender | s/step | spread | CPU s | tokens/s | x HF fp32 | x HF's best | of limit "
        "| peak GiB |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for c in everyone:
        cells = [
            c.label,
            f"{statistics.median(c.seconds):.2f}",
            c.spread,
            f"{statistics.median(c.cpu):.2f}",
            f"{c.speed:,.0f}",
            f"{c.speed / fp32.speed:.2f}",
            f"{c.speed / best.speed:.2f}",
            f"{c.speed / limit.speed:.0%}",
            f"{c.peak / GIB:.2f}",
        ]
        print("|", " | ".join(cells), "|", flush=True)

    print("\n## Two processes with one thread each\n")
    print("| contenders | tokens/s together | x HF fp32, one process, 2 threads | x 2 HF |")
    print("| --- | ---: | ---: | ---: |")
    together = {}
    kind = "bf16 autocast" if precision() == "bf16" else "fp32"
    for label, spec in {
        f"2 x HF peft, {kind}": {"stack": "peft"},
        f"2 x peftlab, {precision()}": {},
        f"2 x peftlab, {precision()}, compile": {"compile": True},
        f"2 x matmuls alone, {precision()} (the limit)": {"stack": "matmul"},
    }.items():
        together[label], _ = side_by_side([spec | {"threads": 1}] * 2, 4)
        print(
            f"| {label} | {together[label]:,.0f} | {together[label] / fp32.speed:.2f} "
            f"| {together[label] / next(iter(together.values())):.2f} |",
            flush=True,
        )
    return {
        "steps": {c.label: {"seconds": c.seconds, "cpu": c.cpu, "peak": c.peak} for c in everyone},
        "side by side": together,
    }


METHODS = {  # at equal rank; the tied ones without a large boost, which would only overflow
    "dora": ["method=dora"],
    "simple_dora": ["method=simple_dora"],
    "tied_lora": ["method.rank=8"],
    "partially_tied_lora": [],
    "tied_lora_extra": ["method.r_1=8", "method.r_2=8"],
    "tensor_embedding": ["method.r_1=8", "method.r_2=8"],
    "gamma_lora": [],
    "top_layers": [],
    "ladder": [],
    "prompt_tuning": [],
}


def methods(rounds: int, names: list[str], compiled: bool) -> dict[str, Any]:
    """Measure steps of other methods, each in turn with LoRA; DoRA also as Hugging Face has it."""
    print(f"\n## A step of other methods, in LoRA's ({'compile' if compiled else 'no compile'})\n")
    print("| method | x LoRA's seconds | s/step | spread | LoRA beside it | spread | peak GiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    ours = [Contender(n, method=n, overrides=METHODS[n], compile=compiled) for n in names]
    found = _beside(Contender("lora", compile=compiled), ours, rounds)
    if "dora" in names:
        theirs = Contender("HF peft's dora, in its LoRA's steps", stack="peft", method="dora")
        found |= _beside(Contender("HF peft's lora", stack="peft"), [theirs], rounds)
    return {"methods": found}


def _beside(lora: Contender, others: list[Contender], rounds: int) -> dict[str, Any]:
    """Let each of the others take turns with LoRA."""
    found = {}
    lora.begin()
    for other in others:
        other.begin()
        lora.seconds.clear()
        for _ in range(rounds):
            lora.steps(2)
            other.steps(2)
        other.close()
        ratio = lora.speed / other.speed
        found[other.label] = {"ratio": ratio, "seconds": other.seconds, "lora": [*lora.seconds]}
        cells = [other.label, f"{ratio:.2f}"]
        for c in (other, lora):
            cells += [f"{statistics.median(c.seconds):.2f}", c.spread]
        print("|", " | ".join([*cells, f"{other.peak / GIB:.2f}"]), "|", flush=True)
    lora.close()
    return found


GROWTH: dict[str, list[dict[str, Any]]] = {
    "batch": [{"rows": n} for n in (1, 4, 16)],
    "length": [{"length": n} for n in (32, 128, 512)],
    "rank": [{"overrides": [f"method.rank={n}"]} for n in (1, 16, 128)],
    "layers": [{"layers": n} for n in (5, 15, 30)],
}


def growth(rounds: int) -> dict[str, Any]:
    """Measure how speed and memory grow with one size, the others as in `steps`."""
    found: dict[str, Any] = {}
    for what, specs in GROWTH.items():
        print(f"\n## LoRA against {what} (no compile)\n")
        print(f"| {what} | s/step | spread | tokens/s | peak GiB |")
        print("| --- | ---: | ---: | ---: | ---: |")
        values = [value for spec in specs for value in spec.values()]
        labels = [v[0].split("=")[1] if isinstance(v, list) else str(v) for v in values]
        contenders = [Contender(at, **spec) for at, spec in zip(labels, specs, strict=True)]
        alternate(contenders, rounds)
        for label, contender in zip(labels, contenders, strict=True):
            median = statistics.median(contender.seconds)
            found[f"{what} {label}"] = {"seconds": contender.seconds, "peak": contender.peak}
            cells = [
                label,
                f"{median:.2f}",
                contender.spread,
                f"{contender.speed:,.0f}",
                f"{contender.peak / GIB:.2f}",
            ]
            print("|", " | ".join(cells), "|", flush=True)
    return found


def host() -> str:
    """Return what the figures depend on."""
    import peft
    import torch
    import transformers

    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    parts = [f"{CORES} cores of {cpu}", f"Python {platform.python_version()}"]
    parts += [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    return ", ".join([*parts, f"peft {peft.__version__}", f"load {os.getloadavg()[0]:.1f}"])


def main() -> int:
    """Read the command line and measure."""
    if sys.argv[1:2] == ["contend"]:
        contend(json.loads(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["steps", "methods", "growth", *COMMANDS])
    parser.add_argument("--rounds", type=int, help="default: 4; of `losses` 1, of `study` 2")
    parser.add_argument("--starts", type=int, default=2, help="processes of each, of `steps`")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--compile", action="store_true", help="of `methods`")
    parser.add_argument(
        "--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of `losses`"
    )
    parser.add_argument("--json", type=Path)
    known = parser.parse_args()
    rounds = known.rounds or {"losses": 1, "study": 2}.get(known.what, 4)
    unit = "of each in turn" if known.what in COMMANDS else "of 2 steps"
    print(f"{host()}; {rounds} rounds {unit}, {precision()}, medians.")
    # not above: a contender's process has no use for what these import
    from bench_commands import losses, starts
    from bench_study import study

    match known.what:
        case "steps":
            found = steps(rounds, known.starts)
        case "methods":
            found = methods(rounds, known.methods, known.compile)
        case "growth":
            found = growth(rounds)
        case "starts":
            found = starts(rounds)
        case "losses":
            found = losses(rounds, known.overrides)
        case _:
            found = study(rounds)
    if known.json is not None:
        known.json.write_text(json.dumps({"host": host(), **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

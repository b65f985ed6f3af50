"""Run folders made by hand: the files of a run, without the run."""

import copy
import json

import yaml

CONFIG = {
    "model": {"name": "toy", "source": "bundled", "path": "toy", "sha256": None, "quantize": None},
    "method": {"_target_": "peftlab.methods.lora.LoRA", "sites": "all", "rank": 8, "lr": 1e-3},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3, "betas": [0.9, 0.999]},
    "dataset": {"name": "words", "source": "local", "train_size": 100},
    "epochs": 3,
    "seed": 0,
    "precision": "fp32",
    "batch": 8,
}
BASE = 6.0
GIB = 2**30


def make(
    folder,
    method="lora",
    train=3.0,
    test=None,
    *,
    seed=0,
    params=1000,
    trial=None,
    status="completed",
    config=(),
    result=(),
    rows=True,
):
    """Write one run. config, result: changes by dotted key. test: None is train + 0.5."""
    settings = copy.deepcopy(CONFIG)
    settings["method"]["_target_"] = f"peftlab.methods.{method}.Method"
    for key, value in {"seed": seed, **dict(config)}.items():
        _set(settings, key, value)
    done = status == "completed"
    test = train + 0.5 if test is None else test
    record = {
        "schema": 1,
        "status": status,
        "error": None if done else "why it ended",
        "run_id": str(folder),
        "study": None if trial is None else folder.parent.name,
        "trial": trial,
        "seed": seed,
        "model": {"name": "toy", "source": "toy", "sha256": "a" * 64, "total_params": 100_000},
        "method": {
            "name": method,
            "args": {k: v for k, v in settings["method"].items() if k != "_target_"},
            "trainable_params": params,
            "stored_bytes": 4 * params if done else None,
            "mergeable": True,
        },
        "optimizer": settings["optimizer"],
        "dataset": {"name": settings["dataset"]["name"], "fingerprint": "f" * 64},
        "final": {"train_bits_per_token": train, "test_bits_per_token": test} if done else None,
        "base": {"train_bits_per_token": BASE, "test_bits_per_token": BASE + 0.1} if done else None,
        "cost": {"train_seconds": 10.0, "peak_memory_bytes": GIB, "step_flops": 10**9},
        "merge": {"max_abs_logit_diff": 1e-6, "tolerance": 1e-3, "ok": True} if done else None,
        "provenance": {"precision": settings["precision"], "command": f"peftlab train {method}"},
    }
    for key, value in dict(result).items():
        _set(record, key, value)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "result.json").write_text(json.dumps(record))
    if rows:
        (folder / "rows.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in lines(train, test))
        )
    return folder


def lines(train, test, steps=10):
    """Rows of a run whose step losses fall in a straight line from BASE to `train`."""
    row = {"epoch": 1, "tokens": 0, "lr": None, "grad_norm": None, "targets": 5}
    for split in ("train", "test"):
        yield {**row, "step": 0, "phase": "eval", "split": split, "bits_per_token": BASE}
    for step in range(1, steps + 1):
        bits = BASE + (train - BASE) * step / steps
        yield {**row, "step": step, "phase": "step", "split": "train", "bits_per_token": bits}
    for split, bits in (("train", train), ("test", test)):
        yield {**row, "step": steps, "phase": "eval", "split": split, "bits_per_token": bits}


def confirm(sweep, trials):
    """Write what a sweep says of the trials that it ran again: trial -> seeds."""
    entries = {
        n: {"mean": 0.0, "seeds": {str(s): 0.0 for s in seeds}} for n, seeds in trials.items()
    }
    (sweep / "optimization_results.yaml").write_text(yaml.safe_dump({"confirmed": entries}))


def _set(node, key, value):
    *path, last = key.split(".")
    for part in path:
        node = node[part]
    node[last] = value

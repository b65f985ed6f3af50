"""The command: one verb, one function. Torch is imported only by the verbs that compute."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from peftlab import __version__
from peftlab.errors import InputError

USAGE = """\
peftlab train [KEY=VALUE ...]        fine-tune; no argument: SmolLM2-135M, offline, in minutes
peftlab train -m [KEY=V1,V2 ...]     many runs: grids, +sweeps=NAME, hydra/launcher=...
peftlab train --help                 every key; --cfg job prints the composed config
peftlab methods [NAME]               the methods, or one with its equation
peftlab report [DIR ...]             compare runs: tables, and a page to look at; --help
peftlab analyze [QUESTION RUN ...]   ask runs a question; alone: the questions
peftlab export RUN --to FORM -o DIR  merged: a model for transformers; adapter: ours; peft: for peft
peftlab reproduce RUN                run it again: the same numbers, or what differs
peftlab sync [DIR]                   upload offline W&B runs
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code (2: bad input, told in one line)."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="peftlab",
        description="Which parameter-efficient fine-tuning method is best, all tuned equally hard?",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="peftlab VERB ...",
    )
    parser.add_argument("--version", action="version", version=f"peftlab {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    verbs.add_parser("train", add_help=False, help="one run, or many with -m")
    methods = verbs.add_parser("methods", help="list the methods, or show one")
    choice = methods.add_mutually_exclusive_group()
    choice.add_argument("name", nargs="?")
    choice.add_argument("--markdown", action="store_true", help="write docs/methods.md to stdout")
    reports = verbs.add_parser(
        "report", prog="peftlab report", help="compare runs: tables, and a page to look at"
    )
    reports.add_argument("folders", nargs="*", metavar="DIR", help="run folders; default: outputs")
    reports.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: report.html")
    reports.add_argument(
        "--wandb", action="append", default=[], type=Path, metavar="DIR", help="offline W&B runs"
    )
    tables = reports.add_mutually_exclusive_group()
    for name in ("csv", "latex", "markdown"):
        text = f"the tables as {name} instead, to stdout or FILE"
        tables.add_argument(f"--{name}", dest="table", action="store_const", const=name, help=text)
    verbs.add_parser("analyze", add_help=False, help="ask runs a question; alone: which there are")
    exports = verbs.add_parser("export", help="write what a run has trained, for others to load")
    exports.add_argument("run", type=Path, metavar="RUN", help="its folder, or an exported adapter")
    forms = "merged (a checkpoint of transformers), adapter (ours), peft (Hugging Face's)"
    exports.add_argument("--to", required=True, metavar="FORM", help=forms)
    exports.add_argument("-o", "--output", required=True, type=Path, metavar="DIR")
    text = "of merged weights; fp32 (default) keeps the function, bf16 is half as large"
    exports.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help=text)
    text = "folder with the base model, if it is no longer where the run took it from"
    exports.add_argument("--base", type=Path, metavar="DIR", help=text)
    again = verbs.add_parser("reproduce", help="run a run again and compare every number")
    again.add_argument("run", type=Path, metavar="RUN", help="its folder")
    sync = verbs.add_parser("sync", help="upload offline W&B runs")
    sync.add_argument("folders", nargs="*", default=["outputs"], metavar="DIR")
    known, rest = parser.parse_known_args(words)
    if known.verb is None:
        parser.print_help()
        return 0
    if known.verb not in ("train", "analyze") and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")

    def work() -> int:
        match known.verb:
            case "train":
                from peftlab.allocator import keep_memory

                keep_memory()
                from peftlab.train import train

                return train(rest)
            case "methods":
                from peftlab.cards import show_methods

                return show_methods(known.name, markdown=known.markdown)
            case "report":
                from peftlab.report.command import report

                folders = known.folders or ([] if known.wandb else ["outputs"])
                return report(
                    [Path(folder) for folder in folders],
                    wandb=known.wandb,
                    output=known.output,
                    table=known.table,
                )
            case "analyze":
                from peftlab.analyze import analyze

                return analyze(rest)
            case "export":
                from peftlab.export import export

                folder, base = known.output, known.base
                return export(known.run, known.to, folder, dtype=known.dtype, base=base)
            case "reproduce":
                from peftlab.reproduce import reproduce

                return reproduce(known.run)
            case _:
                from peftlab.sync import sync

                return sync([Path(folder) for folder in known.folders])

    return guarded(work)


def guarded(work: Callable[[], int]) -> int:
    """Run `work`; bad input ends in one line and exit code 2, unless HYDRA_FULL_ERROR=1."""
    try:
        return work()
    except KeyboardInterrupt:  # before or after training, which has its own way to stop
        print("peftlab: interrupted; the same command goes on from there", file=sys.stderr)
        return 128 + signal.SIGINT
    except InputError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"peftlab: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Runs commands of peftlab in forks of a process that has imported all of it, and kills them.

A line of JSON on stdin asks for one: folder, environment, words, and perhaps when to send which
signal: `seconds` after the `nth` time that the command passes `mark`. A line of JSON on stdout
answers: exit code, standard error, and every mark with its time. Nothing of the command is changed:
marks come from Python's audit events and from a tracker.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

import peftlab.run  # noqa: F401
import peftlab.train  # noqa: F401
from peftlab import packages
from peftlab.__main__ import main
from peftlab.tracking import NoTracker

MARKS = -1  # the descriptor to write to, in a fork


def mark(name):
    if MARKS >= 0:
        os.write(MARKS, f"{name}\n".encode())


class Tell(NoTracker):
    """A tracker that marks every row."""

    def log(self, row):
        mark(f"{row['phase']} {row['split']} {row['step']}")


def on_event(event, arguments):
    if event == "subprocess.Popen":
        words = [os.fspath(word) for word in arguments[1]]
        mark("Popen pip" if "pip" in words else f"Popen {' '.join(words[1:3])}")
    elif event == "os.rename":
        path = Path(os.fsdecode(arguments[1]))
        kind = path.parent.name
        mark(f"whole {kind if kind in ('wheels', 'models', 'tokens') else path.name}")
    elif event in ("open", "os.mkdir") and isinstance(arguments[0], str | bytes):
        path = Path(os.fsdecode(arguments[0]))
        if path.name.startswith(".") and path.suffix != ".lock" and event == "os.mkdir":
            mark(f"making {path.parent.name}")
        elif path.name.startswith(".") and len(path.name.split(".")) > 3:
            mark(f"writing {path.name.rpartition('.')[0][1:]}")


def command(asked, marks):
    """In a fork: be the command."""
    global MARKS
    error = os.open(asked["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd, n in ((nowhere, 0), (nowhere, 1), (error, 2)):
        os.dup2(fd, n)
    os.chdir(asked["folder"])
    os.environ.update(asked["environment"])
    for name, (requirement, sha256) in asked["packages"].items():
        packages.PACKAGES[name] = packages.Package(requirement, sha256, "")
    MARKS = marks
    sys.addaudithook(on_event)
    code = 70
    try:
        code = main(asked["words"])
    except SystemExit as end:
        code = end.code
    finally:  # with its traceback, if there is one
        if sys.exc_info()[0] is not None:
            import traceback

            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def serve(asked):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        command(asked, write)
    os.close(write)
    seen, text, due = [], b"", None
    left = 0 if asked["kill"] is None else asked["kill"]["nth"]
    while True:
        timeout = None if due is None else max(0, due - time.monotonic())
        if not select.select([read], [], [], timeout)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, asked["kill"]["signal"])
            due = None
            continue
        chunk = os.read(read, 65536)
        if not chunk:
            break
        *names, text = (text + chunk).split(b"\n")
        for name in map(bytes.decode, names):
            seen.append([name, time.monotonic()])
            if asked["kill"] is not None and name == asked["kill"]["mark"]:
                left -= 1
                if left == 0:
                    due = time.monotonic() + asked["kill"]["seconds"]
    os.close(read)
    status = os.waitpid(child, 0)[1]
    told = Path(asked["stderr"]).read_text()
    return {"code": os.waitstatus_to_exitcode(status), "stderr": told, "marks": seen}


if __name__ == "__main__":
    sys.modules["forkserver"] = sys.modules["__main__"]  # the tracker's module is this one
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would lose all but one"
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)

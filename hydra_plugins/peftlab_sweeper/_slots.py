"""Slots: as many trials at a time as the launcher bears, each independent of the others."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

Work = Callable[[], Any]


class Slots:
    """Runs work side by side, or one at a time in this very thread.

    Each piece is a launch of its own, so that nothing waits for the slowest of a batch and one
    that dies takes no other with it. Only the caller's thread ever touches the study.
    """

    def __init__(self, size: int, *, in_process: bool) -> None:
        self.size = size
        self.in_process = in_process  # signals reach a job only in the main thread
        self.waiting: deque[tuple[Hashable, Work]] = deque()
        self.done: queue.Queue[tuple[Hashable, Any]] = queue.Queue()
        self.busy: set[Hashable] = set()

    @property
    def free(self) -> bool:
        """Whether another piece of work can start."""
        return len(self.busy) < self.size

    def start(self, key: Hashable, work: Work) -> None:
        """Start a piece of work; its result comes back with `key`."""
        self.busy.add(key)
        if self.in_process:
            self.waiting.append((key, work))
            return
        # daemon: a job on a cluster that never answers does not keep this process
        threading.Thread(target=self._work, args=(key, work), daemon=True).start()

    def _work(self, key: Hashable, work: Work) -> None:
        try:
            result = work()
        except BaseException as error:  # handed to the caller's thread, whatever it is
            result = error
        self.done.put((key, result))

    def next(self, seconds: float) -> tuple[Any, Any] | None:
        """Return (key, result or exception) of what ended next; None if nothing did in time."""
        if self.waiting:
            key, work = self.waiting.popleft()
            try:
                result = work()
            except Exception as error:
                result = error
        else:
            try:
                key, result = self.done.get(timeout=seconds)
            except queue.Empty:
                return None
        self.busy.discard(key)
        return key, result

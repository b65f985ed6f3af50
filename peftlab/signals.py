"""Signals that ask a run to stop: it first writes all that is needed to go on."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from peftlab.show import warn

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # that a batch system is about to stop the job


@dataclass
class Asked:
    """The signals that have asked the run to stop, and who else listens to them."""

    received: list[int]
    others: Mapping[int, Callable]  # handlers that were there before the run's own

    def ends(self, save: Callable[[], None]) -> bool:
        """Whether the run is to end now; if it was asked to, all is saved before it is decided.

        Where there is another handler, that one decides: submitit's, for instance, has its job
        queued again and exits, or returns, and the run goes on.
        """
        if self.received:
            save()
        while self.received and self.received[0] in self.others:
            number = self.received.pop(0)
            self.others[number](number, None)
        return bool(self.received)


@contextmanager
def listening() -> Iterator[Asked]:
    """Collect SIGTERM and SIGINT: the run stops at the next step; a second SIGINT stops at once.

    SIGUSR1 and SIGUSR2 as well where somebody listens to them: a batch system's warning.
    """
    ours = [signal.SIGTERM, signal.SIGINT]
    before = {number: signal.getsignal(number) for number in (*ours, *WARNINGS)}
    # Python itself listens to SIGINT
    others: dict[int, Callable] = {
        n: h for n, h in before.items() if callable(h) and n != signal.SIGINT
    }
    asked = Asked([], others)

    def on_signal(number: int, frame: object) -> None:
        if asked.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.received.append(number)
        warn(f"{signal.Signals(number).name}: finishing this step, then writing a checkpoint")

    for number in {*ours, *others}:
        signal.signal(number, on_signal)
    try:
        yield asked
    finally:
        for number in {*ours, *others}:
            signal.signal(number, before[number])

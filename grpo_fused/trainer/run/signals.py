"""Turns SIGTERM and Ctrl-C into a request to stop after the current training step."""

import os
import signal
import sys
import threading
import time

from tqdm import tqdm

FORWARDING = 3.0
NOTICE = {
    signal.SIGINT: "Ctrl-C: stopping after this step (a second Ctrl-C stops at once, unsaved)",
    signal.SIGTERM: "SIGTERM: stopping after this step",
}


class StopSignals:
    """Context manager that records a SIGTERM or SIGINT instead of acting on it.

    A second Ctrl-C interrupts as usual, a second SIGTERM has no effect: launchers forward signals
    to workers that have already received them. So under a launcher of torch, a second Ctrl-C
    within FORWARDING seconds has no effect either. A signal that was ignored stays ignored:
    shells start background jobs that way.

    Args:
        show: whether to say at once, on standard error, that a signal was received.

    Attributes:
        received: number of the signal; 0 for none.
    """

    def __init__(self, show: bool = False):
        self.show = show

    def __enter__(self) -> "StopSignals":
        self.received, self.previous = 0, {}
        if threading.current_thread() is threading.main_thread():  # Python's rule for handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        while self.previous:
            signal.signal(*self.previous.popitem())

    def _receive(self, number, frame):
        if not self.received:
            self.received, self.since = number, time.monotonic()
            if self.show:
                announce(NOTICE[number])
        elif number == signal.SIGINT:
            forwarded = "TORCHELASTIC_RUN_ID" in os.environ
            if not forwarded or time.monotonic() - self.since > FORWARDING:
                signal.signal(number, self.previous.pop(number))
                signal.raise_signal(number)


def announce(text: str) -> None:
    """Prints a line to standard error, above a progress bar; safe in a signal handler."""
    try:
        tqdm.write(text, file=sys.stderr)
    except RuntimeError:  # the signal came while a line was being written
        os.write(2, f"\n{text}\n".encode())

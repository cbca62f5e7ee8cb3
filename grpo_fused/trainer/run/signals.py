"""Turns SIGTERM and Ctrl-C into a request to stop after the current training step."""

import signal
import threading


class StopSignals:
    """Context manager that records a SIGTERM or SIGINT instead of acting on it.

    A second Ctrl-C interrupts as usual. A second SIGTERM has no effect, because launchers forward
    the signal to workers that have already received it. A signal that was ignored stays ignored:
    shells start background jobs that way.

    Attributes:
        received: number of the signal; 0 for none.
    """

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
        self.received = number
        if signal.SIGINT in self.previous:
            signal.signal(signal.SIGINT, self.previous.pop(signal.SIGINT))

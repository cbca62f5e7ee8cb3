"""SIGTERM and Ctrl-C end a run between two steps."""

import signal
import threading


class Signals:
    """While entered, remembers a SIGTERM or SIGINT; a second Ctrl-C does what it always does.

    A second SIGTERM does nothing more: launchers forward what their workers have got themselves.

    One that is ignored stays so: shells start what runs in the background without Ctrl-C.

    Attributes:
        received: number of the signal, 0 for none.
    """

    def __enter__(self):
        self.received, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number, frame):
        self.received = number
        if signal.SIGINT in self.before:
            signal.signal(signal.SIGINT, self.before.pop(signal.SIGINT))

    def _restore(self):
        while self.before:
            signal.signal(*self.before.popitem())

    def __exit__(self, *exception):
        self._restore()

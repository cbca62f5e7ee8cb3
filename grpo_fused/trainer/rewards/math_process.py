"""Comparing mathematical answers in a process of its own, which the system can end.

An answer such as 9**9**9**9 keeps an interpreter in one multiplication, where no exception reaches
it, and no thread can be killed. So a child does the work, and sets itself an alarm for each task,
at which the system ends it. This file is both: a module of the trainer, and the script that the
child runs, which imports none of it.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import warnings

LIMIT = 5.0  # seconds for a task: to parse an answer, or to parse another and compare them
MEMORY = 8 * 2**30  # bytes of address space of the child


class MathProcess:
    """A child that compares answers with math-verify; a new one replaces one that was ended.

    Several threads may use it; one task is done at a time.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None

    def ask(self, gold: str, text: str | None = None) -> bool:
        """Returns whether the text has the answer `gold`; without a text, whether it can be parsed.

        It is False, with a warning, for a task that takes longer than LIMIT seconds or more memory
        than MEMORY.

        Raises:
            ImportError: the child cannot import math-verify.
        """
        with self._lock:
            if self._child is None:
                self._child = self._start()
            answer = self._exchange(json.dumps([gold, text]))
            if answer:
                return json.loads(answer)
            self._child.kill()
            self._child.communicate()
            code, self._child = self._child.returncode, None
        reason = f"took longer than {LIMIT:g} s" if code == -signal.SIGALRM else "ended its process"
        warnings.warn(
            f"math_verify: an answer {reason}, and counts as one that cannot be parsed",
            stacklevel=2,
        )
        return False

    def _start(self):
        command = [sys.executable, os.path.abspath(__file__), str(LIMIT)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._child = subprocess.Popen(command, text=True, encoding="utf-8", **pipes)
        found = self._child.stdout.readline().strip()
        if found != "ready":
            self.close()
            raise ImportError(f"math-verify cannot be imported ({found or 'no answer'})")
        return self._child

    def _exchange(self, line):
        """The answer to a line; "" if the child has ended."""
        try:
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()
            return self._child.stdout.readline()
        except BrokenPipeError:
            return ""
        except BaseException:  # Ctrl-C: the answer would be taken for that of the next task
            self.close()
            raise

    def close(self) -> None:
        """Ends the child; a later task starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None


@functools.cache
def math_process(process_id: int) -> MathProcess:
    """Returns the MathProcess of this process: a fork must not share its parent's pipes."""
    process = MathProcess()
    atexit.register(process.close)
    return process


def main(limit: float) -> None:
    """Answers lines [gold, text] with true or false, within `limit` seconds each."""
    for number in (signal.SIGINT, signal.SIGTERM):  # for the parent, which may want one more answer
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the system ends the process
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print

    def answer(value):
        answers.write(value + "\n")
        answers.flush()

    try:
        import logging
        import resource

        from math_verify import parse, verify

        logging.disable()  # "Timeout is disabled"
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except Exception as error:
        answer(f"{type(error).__name__}: {error}")
        return
    parsed = functools.lru_cache(functools.partial(parse, parsing_timeout=None))
    answer("ready")
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, limit)
        gold, text = json.loads(line)
        found = parsed(gold)
        if text is not None:
            theirs = parse(text, parsing_timeout=None)
            found = verify(found, theirs, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answer(json.dumps(bool(found)))


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are those of a package
    main(float(sys.argv[1]))

"""Tests on a mutant in a fork of one live pytest session: nothing is imported or collected twice.

`serve` collects the tests of a copy of the tree and calls back inside the session. From there a
`Fork` puts a mutant's code into the functions that everything has already imported, and runs tests
in the given order until one fails. What runs while modules are imported has run by then: where a
mutant could hide there (`Copy.runs_early`), a fresh interpreter imports the mutant instead.
"""

import ast
import contextlib
import gc
import json
import linecache
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

OPTIONS = ["-sq", "--tb=no", "--assert=plain", "-pno:cacheprovider"]
UNKNOWN_SECONDS = 150  # for a test that has never passed before: it may compile
START_SECONDS = 300  # for a fresh interpreter: it imports torch and collects


class Copy:
    """A copy of the tree: sources in lib/, for conftest takes the tests' parent off sys.path."""

    def __init__(self, root, directory):
        self.directory = Path(directory).resolve()
        no_cache = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / "grpo_fused", self.directory / "lib/grpo_fused", ignore=no_cache)
        shutil.copytree(root / "kernels", self.file("kernels/"), ignore=no_cache)
        shutil.copytree(root / "tests", self.directory / "tests", ignore=no_cache)
        shutil.copy(root / "pyproject.toml", self.directory)
        (self.directory / "tmp").mkdir()
        self.functions = defaultdict(list)
        self.early = set()

    def file(self, path):
        """Where a source of the project stands in the copy."""
        return self.directory / "lib/grpo_fused" / path.removeprefix("grpo_fused/")

    def is_ours(self, code):
        return code.co_filename.startswith(f"{self.directory}/lib/")

    def note_call(self, frame, event, argument):
        """For sys.setprofile: what runs before the first test."""
        if event == "call" and self.is_ours(frame.f_code):
            self.early.add(position(frame.f_code))

    def find_functions(self):
        """Find all functions of the package, however wrapped; compile kernels' rewritten code."""
        interpreter = sys.modules.get("triton.runtime.interpreter")
        for found in gc.get_objects():
            if type(found) is FunctionType and self.is_ours(found.__code__):
                self.functions[position(found.__code__)].append(found)
            if interpreter and type(found) is interpreter.InterpretedFunction:
                found.rewrite()

    def runs_early(self, mutant):
        """Whether a function that holds the change has run before the first test."""
        file = str(self.file(mutant.path))
        lines = {line for name, line, _ in self.early if name == file}
        for node in ast.walk(ast.parse(Path(file).read_text())):
            if isinstance(node, ast.FunctionDef) and node.lineno <= mutant.number:
                first = min([node.lineno, *(x.lineno for x in node.decorator_list)])
                if mutant.number <= node.end_lineno and any(
                    first <= line <= node.end_lineno for line in lines
                ):
                    return True
        return False

    def swaps(self, path, source):
        """[(function, its code in the changed source)], or None if some of them cannot have it."""
        file = self.file(path)
        old, new = (
            list(codes(compile(text, str(file), "exec"))) for text in (file.read_text(), source)
        )
        if [x.co_name for x in old] != [x.co_name for x in new]:
            return None
        pairs, places = [], set()
        for before, after in zip(old, new, strict=True):
            functions = self.functions[position(before)]
            if functions and (
                position(before) in places or before.co_freevars != after.co_freevars
            ):
                return None
            places.add(position(before))
            pairs += [(function, after) for function in functions]
        return pairs

    def swap(self, path, source):
        """In a fork: from here on, the package is the changed one."""
        interpreter = sys.modules.get("triton.runtime.interpreter")
        for function, code in self.swaps(path, source):
            function.__code__ = code
            if interpreter:
                interpreter.InterpretedFunction.rewritten_fn.pop(function, None)
        file = str(self.file(path))  # where Triton's interpreter looks for the text of a kernel
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)


def position(code):
    return code.co_filename, code.co_firstlineno, code.co_name


def codes(code):
    """A code object and all inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


class Session:
    """Plugin of pytest: calls back with the collected items instead of running them."""

    def __init__(self, call):
        self.call, self.failed, self.error, self.on_failure = call, [], None, None

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed.append(f"{report.nodeid}: {report.longreprtext}")

    def pytest_runtestloop(self, session):
        sys.setprofile(None)
        try:
            if self.failed:
                raise RuntimeError("collection fails without a mutation:\n" + self.failed[0])
            self.call(self, session.items)
        except BaseException as error:
            self.error = error
        return True

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.on_failure()

    def run(self, items, pipe):
        """In a fork: run items, tell the pipe, and exit at the first failure."""

        def tell(word):
            os.write(pipe, f"{word}\n".encode())

        def fail():
            tell("failed")
            os._exit(0)

        self.on_failure = fail
        for item, following in zip(items, [*items[1:], None], strict=True):
            tell("start")
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            tell("passed")
        tell("done")
        os._exit(0)


def serve(directory, files, call, trace=None):
    """Collect test files below a directory, call(session, items) inside of pytest."""
    import hypothesis.internal.conjecture.engine as engine
    import pytest

    engine.MAX_SHRINKS = 0  # any counterexample will do, the smallest takes minutes
    os.chdir(directory)
    os.environ["PYTEST_DEBUG_TEMPROOT"] = f"{directory}/tmp"
    sys.path.insert(0, f"{directory}/lib")
    sys.setprofile(trace)
    output = sys.stdout

    def called(session, items):
        with contextlib.redirect_stdout(output):
            call(session, items)

    session = Session(called)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        code = pytest.main([*OPTIONS, *files], plugins=[session])
    if session.error:
        raise session.error
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {code!r}")


class Outcome(NamedTuple):
    """How a run ended: "done", "failed", "crash" or "timeout"; the last item is what did not pass.

    Attributes:
        times: seconds of each item that ran.
        cpu: seconds of CPU time of the whole fork.
    """

    why: str
    times: list[float]
    cpu: float


class Fork:
    """A run of items on a changed source; `poll` tells when and how it ended."""

    def __init__(self, copy, session, path, source, items, seconds, fresh=False):
        self.items, self.seconds, self.times = items, seconds, []
        self.begun, self.started, self.rest = time.monotonic(), False, b""
        self.pipe, end = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(end)
            os.set_blocking(self.pipe, False)
            return
        try:
            os.setsid()
            os.close(self.pipe)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            if fresh:
                execute_fresh(copy, path, source, [item.nodeid for item in items], end)
            copy.swap(path, source)
            session.run(items, end)
        finally:
            os._exit(70)

    def fileno(self):
        return self.pipe

    def limit(self):
        """When the item that runs is late: a loop may no longer end."""
        if not self.started:
            return self.begun + START_SECONDS
        known = self.seconds.get(self.items[min(len(self.times), len(self.items) - 1)].nodeid)
        return self.begun + (UNKNOWN_SECONDS if known is None else 20 + 5 * known)

    def poll(self):
        """None while it runs, then its Outcome."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.pipe, 65536)
            *lines, self.rest = (self.rest + data).split(b"\n")
            for line in lines:
                if line in (b"failed", b"done"):
                    return self.end(line.decode())
                self.note(line)
            if not data:
                return self.end("crash")
        if time.monotonic() > self.limit():
            return self.end("timeout")
        return None

    def note(self, line):
        now, self.started = time.monotonic(), True
        if line == b"passed":
            self.times.append(now - self.begun)
        self.begun = now

    def end(self, why):
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)
        usage = os.wait4(self.pid, 0)[2]
        os.close(self.pipe)
        if why != "done":
            self.times.append(time.monotonic() - self.begun)
        return Outcome(why, self.times, usage.ru_utime + usage.ru_stime)


def execute_fresh(copy, path, source, nodeids, pipe):
    """Become an interpreter that imports the changed source and runs the same items."""
    directory = copy.directory / f"fresh{os.getpid()}"
    for name in ("lib", "tests"):
        shutil.copytree(copy.directory / name, directory / name)
    shutil.copy(copy.directory / "pyproject.toml", directory)
    (directory / "tmp").mkdir()
    file = directory / copy.file(path).relative_to(copy.directory)
    file.write_text(source)
    (directory / "nodeids").write_text(json.dumps(nodeids))
    os.set_inheritable(pipe, True)
    os.execv(sys.executable, [sys.executable, "-B", __file__, str(directory), str(pipe)])


def run_fresh(directory, pipe):
    nodeids = json.loads((directory / "nodeids").read_text())

    def call(session, items):
        by_nodeid = {item.nodeid: item for item in items}
        session.run([by_nodeid[nodeid] for nodeid in nodeids], pipe)

    serve(directory, sorted({nodeid.split("::")[0] for nodeid in nodeids}), call)


if __name__ == "__main__":
    del sys.path[0]  # this folder
    run_fresh(Path(sys.argv[1]), int(sys.argv[2]))

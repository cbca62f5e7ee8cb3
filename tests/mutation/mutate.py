"""Mutation testing: one sign, bound, mask or index of the mathematics changed at a time.

A mutant that every test passes is a survivor: a hole in the suite, or a change without a meaning,
which `mutants_equivalent.py` explains. `tables.py` says which sources are mutated, and which tests
kill them. Kernels run in Triton's interpreter.
"""

import argparse
import gc
import hashlib
import importlib
import importlib.metadata
import json
import os
import selectors
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import tables
from exemptions import Exemptions, write
from mutants import mutants
from tables import KILLERS, ROOT

WORDS = ("killed", "explained", "SURVIVED")


def state(quick):
    """A digest of all that a verdict depends on, save the explanations."""
    digest = hashlib.sha256()
    files = [*ROOT.glob("grpo_fused/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    files += [x for x in ROOT.glob("tests/**/*.py") if x.parent.name != "mutation"]
    for path in sorted([*files, ROOT / "pyproject.toml"]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    for package in ("torch", "triton", "pytest", "hypothesis"):
        digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    return digest.hexdigest()[:16] + "-quick" * quick


class Log:
    """Verdicts as lines of JSON, written as they come; the first line names the state of the code.

    Attributes:
        verdicts: {name of a mutant: line as a dict}.
    """

    def __init__(self, file, resume, quick):
        self.file, self.verdicts, now = file, {}, state(quick)
        if resume:
            head, self.verdicts = read_log(file)
            if head["state"] != now:
                raise SystemExit(
                    f"{file} is of the code {head['state']}, this is {now}: "
                    "its verdicts may no longer hold, start again with --log"
                )
            lines = file.read_text().splitlines(keepends=True)
            file.write_text("".join(line for line in lines if line.endswith("\n")))
        elif file:
            file.write_text(json.dumps({"state": now}) + "\n")

    def add(self, line):
        self.verdicts[line["name"]] = line
        if self.file:
            with self.file.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read_log(file):
    """(first line, {name: verdict}); a line that was cut is left out."""
    lines = file.read_text().splitlines(keepends=True)
    head, *lines = [json.loads(line) for line in lines if line.endswith("\n")]
    return head, {line["name"]: line for line in lines}


def hints_of(file):
    """{key of a mutant: nodeid that killed it}, from the log of any state of the code."""
    lines = read_log(file)[1].values() if file else []
    return {line["key"]: line["by"] for line in lines if line["verdict"] == "killed"}


def still_holds(line, reason):
    """Whether a verdict of a log holds with the explanations of today."""
    return line["verdict"] == "killed" or bool(reason) == (line["verdict"] == "explained")


class Task:
    """A judgement under way."""

    def __init__(self, mutant, judgement):
        self.mutant, self.judgement, self.cpu = mutant, judgement, 0.0


def run_all(judge, chosen, reason_of, copy, session, jobs):
    """Yield (mutant, verdict, CPU seconds) as judgements end, `jobs` at a time."""
    from forks import Fork

    waiting = iter(chosen)
    selector = selectors.PollSelector()  # epoll remembers pipes that a later fork holds open

    def go_on(task, outcome):
        try:
            run = task.judgement.send(outcome)
        except StopIteration as end:
            return end.value
        fork = Fork(copy, session, run.path, run.source, run.items, judge.seconds, run.fresh)
        selector.register(fork, selectors.EVENT_READ, task)
        return None

    def start():
        for mutant in waiting:
            go_on(Task(mutant, judge.judge(mutant, reason_of(mutant))), None)
            return

    try:
        for _ in range(jobs):
            start()
        while selector.get_map():
            selector.select(timeout=1.0)
            for entry in list(selector.get_map().values()):
                outcome = entry.fileobj.poll()
                if outcome is None:
                    continue
                task = entry.data
                selector.unregister(entry.fd)
                task.cpu += outcome.cpu
                verdict = go_on(task, outcome)
                if verdict:
                    yield task.mutant, verdict, task.cpu
                    start()
    finally:
        for entry in list((selector.get_map() or {}).values()):
            entry.fileobj.end("cut")


def judge_all(chosen, exemptions, log, options):
    """Collect the tests once, judge the mutants, print and log each verdict."""
    os.environ.update(OMP_NUM_THREADS="1", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # half of a second
    sys.dont_write_bytecode = True  # a mutant may be as long as another, and of the same second
    import forks
    from judging import Judge

    def call(session, items):
        copy.find_functions()
        judge = Judge(items, copy, hints_of(options.hints), options.quick, options.thorough)
        for line in log.verdicts.values():
            if line["verdict"] == "killed":
                judge.learn(line["path"], line["function"], line["by"], killed=True)
        gc.collect()
        gc.freeze()  # what the forks share is no garbage
        runs = run_all(judge, chosen, exemptions.of, copy, session, options.jobs)
        try:
            follow(runs)
        finally:
            gc.unfreeze()  # or nanobind reports Triton's own objects as leaks
        for nodeid, count in judge.extra.most_common(20):
            print(f"kills {count} that no quick test kills: {nodeid}")

    def follow(runs):
        for mutant, verdict, cpu in runs:
            print(f"{verdict.word:9} {mutant.name}  {verdict.by}", flush=True)
            line = {"name": mutant.name, "path": mutant.path, "function": mutant.function}
            line |= {"key": mutant.key, "verdict": verdict.word, "by": verdict.by}
            log.add(line | {"cpu": round(cpu, 2)})

    with tempfile.TemporaryDirectory(prefix="mutants") as directory:
        copy = forks.Copy(ROOT, directory)
        sys.path.remove(str(Path(__file__).parent))
        for name in ("hypothesis", "torch._dynamo", "triton"):
            importlib.import_module(name)
        forks.serve(copy.directory, tables.test_files(), call, copy.note_call)


def table(verdicts):
    """Verdicts counted by file, as a table in Markdown."""
    count, seconds = defaultdict(Counter), Counter()
    for line in verdicts:
        for row in (line["path"], "all"):
            count[row][line["verdict"]] += 1
            seconds[row] += line["cpu"]
    lines = ["| file | mutants | killed | explained | survived | CPU s each |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in [*(path for path in KILLERS if path in count), "all"]:
        number = count[row].total()
        cells = [number, *(count[row][word] for word in WORDS)]
        each = f"{seconds[row] / max(number, 1):.2f}"
        lines.append(f"| {row} | {' | '.join(map(str, cells))} | {each} |")
    return "\n".join(lines)


def absolute(path):
    """A path that holds while the tests run in the directory of a copy."""
    return Path(path).resolve()


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="FILE", choices=KILLERS, default=[*KILLERS])
    parser.add_argument("--limit", type=int, help="number of mutants, evenly spread over all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--quick", action="store_true", help="only the tests that kill fast")
    parser.add_argument(
        "--log", type=absolute, help="append every verdict to this file as it comes"
    )
    parser.add_argument(
        "--resume", type=absolute, metavar="LOG", help="go on with a run that was cut"
    )
    parser.add_argument("--again", type=absolute, metavar="LOG", help="only what survived there")
    parser.add_argument("--hints", type=absolute, metavar="LOG", help="first try what killed there")
    parser.add_argument(
        "--thorough", action="store_true", help="try all quick tests on what is explained, too"
    )
    parser.add_argument(
        "--markdown", type=absolute, help="write the table of the summary to this file"
    )
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    parser.add_argument("--check", action="store_true", help="check tables and explanations only")
    parser.add_argument("--rekey", action="store_true", help="write the explanations anew")
    parser.add_argument(
        "--adopt",
        action="store_true",
        help="with --rekey: follow statements whose surroundings changed",
    )
    return parser.parse_args()


def main():
    options = parse()
    problems = tables.problems()
    if problems:
        print("tests/mutation/tables.py does not fit the code:", *problems, sep="\n  ")
        return 2
    every = [mutant for path in KILLERS for mutant in mutants(path)]
    exemptions = Exemptions(every)
    if options.rekey:
        write(exemptions.rewritten(options.adopt))
    if options.rekey or options.check:
        for line in exemptions.report():
            print(line)
        print(f"{len(every)} mutants, {len(exemptions.reasons)} explained")
        return int(bool(exemptions.stale or exemptions.unclear))
    chosen = [mutant for mutant in every if mutant.path in options.only]
    if options.again:
        lines = read_log(options.again)[1].values()
        survived = {line["key"] for line in lines if line["verdict"] == "SURVIVED"}
        chosen = [mutant for mutant in chosen if mutant.key in survived]
    limit = min(options.limit or len(chosen), len(chosen))
    chosen = [chosen[i * len(chosen) // limit] for i in range(limit)]
    if options.list:
        print(*(f"{x.name} {x.line}" for x in chosen), f"{limit} mutants", sep="\n")
        return 0
    log = Log(options.resume or options.log, bool(options.resume), options.quick)
    left = [
        x
        for x in chosen
        if not (x.name in log.verdicts and still_holds(log.verdicts[x.name], exemptions.of(x)))
    ]
    start = time.monotonic()
    try:
        judge_all(left, exemptions, log, options)
    except KeyboardInterrupt:
        print(f"cut; --resume {log.file} goes on" if log.file else "cut, without --log")
        return 130
    verdicts = [log.verdicts[mutant.name] for mutant in chosen]
    for mutant in chosen:
        if log.verdicts[mutant.name]["verdict"] == "killed" and exemptions.of(mutant):
            print(f"needless explanation, a test kills it: {mutant.name}")
    for line in exemptions.report():
        print(line)
    summary = table(verdicts)
    print(summary)
    if options.markdown:
        options.markdown.write_text(summary + "\n")
    count = Counter(line["verdict"] for line in verdicts)
    print(
        f"{limit} mutants, {count['killed']} killed, {count['explained']} explained, "
        f"{count['SURVIVED']} survived; {len(left)} judged in {time.monotonic() - start:.0f} s"
    )
    return int(count["SURVIVED"] > 0)


if __name__ == "__main__":
    sys.exit(main())

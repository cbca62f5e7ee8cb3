"""Which test kills a mutant: in what order tests are tried, and when a failure counts."""

import re
from collections import Counter, defaultdict, namedtuple

import tables
from _pytest.mark import KeywordMatcher
from _pytest.mark.expression import Expression

# A request of a judgement: run items on the source at a path, in a fork or freshly imported.
Run = namedtuple("Run", "path source items fresh", defaults=(False,))
Verdict = namedtuple("Verdict", "word by")
KILLED, EXPLAINED, SURVIVED = "killed", "explained", "SURVIVED"
UNTRIED_SECONDS, UNTRIED_CHANCE = 0.5, 0.01
NAMED_CHANCE = 0.2  # of a test whose id has the name of the function or class: [k3], Clip(...)
FORK_SECONDS = 0.02  # so that tests of no length are not infinitely good
EXPLAINED_SECONDS = 5.0  # of tests on a mutant that an exemption explains


class Record:
    """How often a test was tried on mutants of one place, and how often it killed."""

    def __init__(self):
        self.kills = self.tries = 0

    def chance(self, prior, weight):
        return (self.kills + weight * prior) / (self.tries + weight)


class Judge:
    """Judges mutants, and learns from each which tests to try first on the next.

    Attributes:
        records: {path or (path, function): {nodeid: Record}}.
        green: nodeids that pass without a mutation: only these can kill.
        seconds: {nodeid: seconds in which it passed}.
        cost: {nodeid: seconds that it took lately, passing or not}.
        extra: Counter of nodeids outside of the quick tests that killed.
    """

    def __init__(self, items, copy, hints, quick_only=False, thorough=False):
        """Hints are {key of a mutant: nodeid that killed it in an earlier run}."""
        self.items, self.copy, self.hints = items, copy, hints
        self.quick_only, self.thorough = quick_only, thorough
        self.by_nodeid = {item.nodeid: item for item in items}
        self.by_file = defaultdict(list)
        for item in items:
            self.by_file[item.nodeid.split("::")[0]].append(item)
        self.extra = Counter()
        self.records = defaultdict(lambda: defaultdict(Record))
        self.green, self.seconds, self.cost = set(), {}, {}
        self.selected = {}
        for path in tables.KILLERS:  # now, and not in an hour: selections that select nothing
            self.stage(path, tables.quick), self.stage(path, tables.everything)

    def select(self, selection):
        """{nodeid: item} of a selection, remembered."""
        if selection not in self.selected:
            wanted = selection.expression and Expression.compile(selection.expression)
            self.selected[selection] = {
                item.nodeid: item
                for file in selection.files
                for item in self.by_file[file]
                if not wanted or wanted.evaluate(KeywordMatcher.from_item(item))
            }
            if not self.selected[selection]:
                raise LookupError(f"tables.py selects no test: {selection}")
        return self.selected[selection]

    def stage(self, path, selections):
        """{nodeid: item} for a source, in order: `selections` is tables.quick or .everything."""
        found = {}
        for selection in selections(path):
            found |= self.select(selection)
        return found

    def order(self, mutant, items):
        """Items by their chance to kill per second: what killed in the same function comes first.

        A test that has not been tried has a small chance, so cheap tests are tried soon.
        """
        function, file = self.records[mutant.path, mutant.function], self.records[mutant.path]
        names = [re.compile(rf"\b{name}\b") for name in mutant.function.split(".")]

        def value(item):
            named = any(name.search(item.nodeid) for name in names)
            chance = file[item.nodeid].chance(NAMED_CHANCE if named else UNTRIED_CHANCE, 1)
            chance = function[item.nodeid].chance(chance, 2)
            return chance / (self.cost.get(item.nodeid, UNTRIED_SECONDS) + FORK_SECONDS)

        return sorted(items, key=value, reverse=True)

    def learn(self, path, function, nodeid, killed):
        for place in ((path, function), path):
            record = self.records[place][nodeid]
            record.tries += 1
            record.kills += killed

    def note_times(self, items, outcome):
        passed = len(outcome.times) - (outcome.why != "done")
        for i, (item, took) in enumerate(zip(items, outcome.times, strict=False)):
            self.cost[item.nodeid] = (self.cost.get(item.nodeid, took) + took) / 2
            if i < passed:
                self.seconds[item.nodeid] = min(took, self.seconds.get(item.nodeid, took))
        return items[:passed]

    def judge(self, mutant, reason):
        """Generator: yields runs, is sent their outcomes, returns a verdict.

        Minutes of tests are only for what nothing kills fast and nothing explains.
        """
        quick = self.stage(mutant.path, tables.quick)
        by = yield from self.quick_killer(mutant, reason, list(quick.values()))
        if by is None and not reason and not self.quick_only:
            slow = self.stage(mutant.path, tables.everything)
            rest = [item for nodeid, item in slow.items() if nodeid not in quick]
            by = yield from self.killer(mutant, rest, fresh=self.may_hide(mutant))
        if by is None:
            return Verdict(EXPLAINED, reason) if reason else Verdict(SURVIVED, "")
        if by not in quick:
            self.extra[by] += 1
        return Verdict(KILLED, by)

    def may_hide(self, mutant):
        """Whether only an interpreter that imports the mutant is sure to run it."""
        swaps = self.copy.swaps(mutant.path, mutant.source)
        return swaps is None or self.copy.runs_early(mutant)

    def quick_killer(self, mutant, reason, items):
        hint = self.by_nodeid.get(self.hints.get(mutant.key))
        swaps = self.copy.swaps(mutant.path, mutant.source)
        if reason and not self.thorough:
            items = self.affordable(self.order(mutant, items))
        by = None
        if swaps is not None and hint:
            by = yield from self.killer(mutant, [hint], fresh=False)
        if swaps is not None and by is None:
            by = yield from self.killer(mutant, items, fresh=False)
        if by is None and self.may_hide(mutant):
            by = yield from self.killer(mutant, items, fresh=True)
        return by

    def affordable(self, items):
        spent, found = 0.0, []
        for item in items:
            spent += self.cost.get(item.nodeid, UNTRIED_SECONDS)
            if spent > EXPLAINED_SECONDS:
                break
            found.append(item)
        return found

    def killer(self, mutant, items, fresh):
        """The first item that fails on a mutant alone, and not without it; or None."""
        items = self.order(mutant, items)
        while items:
            outcome = yield Run(mutant.path, mutant.source, items, fresh)
            passed = self.note_times(items, outcome)
            for item in passed:
                self.learn(mutant.path, mutant.function, item.nodeid, killed=False)
            if outcome.why == "done":
                return None
            item, items = items[len(passed)], items[len(passed) + 1 :]
            was_green = item.nodeid in self.green
            if not was_green:
                yield from self.check_green(item, mutant.path)
            # Alone, and with a limit that is known: the tests before it may have played a part.
            if passed or (outcome.why == "timeout" and not was_green):
                outcome = yield Run(mutant.path, mutant.source, [item], fresh)
                self.note_times([item], outcome)
            killed = outcome.why != "done"
            self.learn(mutant.path, mutant.function, item.nodeid, killed)
            if killed:
                return item.nodeid
        return None

    def check_green(self, item, path):
        """A test that fails without a mutation would kill every mutant."""
        outcome = yield Run(path, self.copy.file(path).read_text(), [item])
        self.note_times([item], outcome)
        if outcome.why != "done":
            raise RuntimeError(f"red without a mutation ({outcome.why}): {item.nodeid}")
        self.green.add(item.nodeid)

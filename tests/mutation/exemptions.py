"""Which mutants `mutants_equivalent.py` explains, and that file written anew.

An entry begins with the key of a mutant (`digests.py`), the rest is for people. Where several
mutants have one key, all of them need an entry: one more or one less in the code, and `Exemptions`
explains none of them, for nobody knows which was meant.
"""

from collections import Counter, defaultdict
from pathlib import Path

from mutants_equivalent import EQUIVALENT

FILE = Path(__file__).with_name("mutants_equivalent.py")
WIDTH = 100  # of a line, as ruff has it


def key_of(entry):
    return entry.split()[0]


def place_of(mutant):
    return f"{Path(mutant.path).stem}.{mutant.function}"


def entry_of(mutant):
    """An entry: the key, then for people the place, the change and the line, or part of it."""
    text = f"{mutant.key} {place_of(mutant)} `{mutant.change}` "
    room = WIDTH - len('        "",') - len(text)
    line = mutant.line
    if len(line) > room and mutant.column > 12:
        begin = max(0, min(mutant.column - 12, len(line) + 3 - room))
        line = "..." + line[begin:]
    return (text + line[:room]).replace('"', "'").replace("\\", "/").rstrip()


class Exemptions:
    """What the entries say of all mutants of the project.

    Attributes:
        reasons: {name of a mutant: the reason why no test can tell it from the code}.
        stale: entries whose key no mutant has.
        unclear: entries with a key that another number of mutants has than of entries.
        moved: {stale entry: the one mutant, in its function or else anywhere, that has its
            statement in other surroundings}.
    """

    def __init__(self, mutants, equivalent=EQUIVALENT):
        self.equivalent = equivalent
        self.by_key = defaultdict(list)
        by_statement = defaultdict(list)
        for mutant in mutants:
            self.by_key[mutant.key].append(mutant)
            by_statement[mutant.key.split("-")[0]].append(mutant)
        entries = [(x, reason) for reason, group in equivalent.items() for x in group]
        number = Counter(key_of(entry) for entry, _ in entries)
        self.reasons, self.stale, self.unclear, self.moved = {}, [], [], {}
        for entry, reason in entries:
            found = self.by_key.get(key_of(entry), [])
            if not found:
                self.stale.append(entry)
            elif len(found) != number[key_of(entry)]:
                self.unclear.append(entry)
            self.reasons |= {x.name: reason for x in found if len(found) == number[x.key]}
        for entry in self.stale:
            statement, place = key_of(entry).split("-")[0], entry.split()[1:2]
            free = [x for x in by_statement[statement] if x.name not in self.reasons]
            there = [x for x in free if [place_of(x)] == place]
            if len(there or free) == 1:
                self.moved[entry] = (there or free)[0]
        taken = Counter(mutant.name for mutant in self.moved.values())
        self.moved = {entry: x for entry, x in self.moved.items() if taken[x.name] == 1}

    def of(self, mutant):
        """Why no test can tell a mutant from the code, or nothing."""
        return self.reasons.get(mutant.name, "")

    def report(self):
        """Lines about entries that explain nothing."""
        for entry in self.stale:
            yield f"stale    {entry}"
            if entry in self.moved:
                yield f"         same statement, other surroundings: {entry_of(self.moved[entry])}"
        for entry in self.unclear:
            found = len(self.by_key[key_of(entry)])
            yield f"unclear  {entry} ({found} mutants have this key: give each an entry, or none)"

    def rewritten(self, adopt=False):
        """{reason: entries} as the code is now; with `adopt`, moved entries follow their mutant."""
        used, result = Counter(), {}
        for reason, group in self.equivalent.items():
            result[reason] = []
            for entry in group:
                found = self.by_key.get(key_of(entry), [])
                if not found and adopt and entry in self.moved:
                    found = [self.moved[entry]]
                again = min(used[key_of(entry)], len(found) - 1)
                used[key_of(entry)] += 1
                result[reason].append(entry_of(found[again]) if found else entry)
        return result


def write(equivalent, file=FILE):
    """Write {reason: entries} under the head of the file, which stays."""
    head = file.read_text().split("EQUIVALENT = {")[0]
    lines = ["EQUIVALENT = {"]
    for reason, group in equivalent.items():
        lines += [f'    "{reason}": [', *(f'        "{entry}",' for entry in group), "    ],"]
    file.write_text(head + "\n".join([*lines, "}"]) + "\n")

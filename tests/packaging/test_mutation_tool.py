"""The tool behind `make mutate`: its tables fit the code, and renaming moves no explanation."""

import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "mutation"
SOURCE = '''
def clipped(ratio, low, high, scale=1.0):
    """Words."""
    values = 0.0
    other = 0.0
    if scale > 0.0:
        values = other / scale
    bounded = ratio.clamp(low, high)
    return torch.where(ratio < low, bounded, values)
'''


@pytest.fixture(scope="module")
def tool():
    """The modules of the tool, found as its script finds them."""
    sys.path.insert(0, str(FOLDER))
    try:
        import exemptions
        import mutants
        import tables
    finally:
        sys.path.remove(str(FOLDER))
    yield exemptions, mutants, tables
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def keys(tool, source):
    return [mutant.key for mutant in tool[1].mutants_of(source, "kernels/any.py")]


def renamed(source, **names):
    for old, new in names.items():
        source = re.sub(rf"\b{old}\b", new, source)
    return source


def test_tables_fit_the_code(tool):
    assert not tool[2].problems()


def test_every_explanation_has_its_mutant(tool):
    """`python tests/mutation/mutate.py --check` says more; `--rekey` writes them anew."""
    exemptions, mutants, tables = tool
    every = [mutant for path in tables.KILLERS for mutant in mutants.mutants(path)]
    found = exemptions.Exemptions(every)
    assert not list(found.report())
    assert len({mutant.name for mutant in every}) == len(every)


def test_keys_tell_mutants_apart(tool):
    found = keys(tool, SOURCE)
    assert len(found) == len(set(found)) > 9


def test_names_are_no_part_of_a_key(tool):
    other = renamed(
        SOURCE, clipped="f", ratio="a", low="b", high="c", scale="d", values="e", other="g"
    )
    assert other != SOURCE and keys(tool, other) == keys(tool, SOURCE)


@pytest.mark.parametrize(
    "old, new",
    [
        ("clamp", "masked_fill"),
        ("where", "minimum"),
        ("< low", "<= low"),
        ("(low, high", "(low, low"),
    ],
)
def test_the_mathematics_is_a_part_of_it(tool, old, new):
    before, after = keys(tool, SOURCE), keys(tool, SOURCE.replace(old, new))
    assert before != after


def test_rows_of_equal_statements_keep_their_order(tool):
    """`values = 0.0` and `other = 0.0` differ by what becomes of the names: an exchange shows."""
    lines = SOURCE.splitlines()
    lines[3], lines[4] = lines[4], lines[3]
    assert keys(tool, "\n".join(lines))[:2] != keys(tool, SOURCE)[:2]


def test_explanations(tool):
    """Found again under other names; stale without a mutant; unclear with too many of one key."""
    exemptions, mutants, _ = tool
    every = list(mutants.mutants_of(SOURCE, "kernels/any.py"))
    equivalent = {"a reason": [exemptions.entry_of(mutant) for mutant in every[:2]]}
    other = list(mutants.mutants_of(renamed(SOURCE, values="divergence"), "grpo_fused/other.py"))
    found = exemptions.Exemptions(other, equivalent)
    assert [found.of(mutant) for mutant in other[:3]] == ["a reason", "a reason", ""]
    assert "divergence" in found.rewritten()["a reason"][0]

    found = exemptions.Exemptions(every[1:], equivalent)
    assert len(found.stale) == 1 and not found.of(every[2])
    found = exemptions.Exemptions([*every, *other], equivalent)
    assert len(found.unclear) == 2 and not found.reasons


def test_an_explanation_follows_its_statement_only_when_told_to(tool):
    exemptions, mutants, _ = tool
    every = list(mutants.mutants_of(SOURCE, "kernels/any.py"))
    place = next(i for i, mutant in enumerate(every) if mutant.change == "Lt -> LtE")
    equivalent = {"a reason": [exemptions.entry_of(every[place])]}
    edited = SOURCE.replace("ratio.clamp(low, high)", "ratio.clamp(low, 2.0 * high)")
    (mutant,) = [x for x in mutants.mutants_of(edited, "kernels/any.py") if x.change == "Lt -> LtE"]
    found = exemptions.Exemptions(list(mutants.mutants_of(edited, "kernels/any.py")), equivalent)
    assert not found.reasons and list(found.moved.values()) == [mutant]
    assert found.rewritten() == equivalent
    assert found.rewritten(adopt=True) == {"a reason": [exemptions.entry_of(mutant)]}

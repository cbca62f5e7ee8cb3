"""Order of memory operations, barriers and cache hints, read from the machine code for sm_90.

Instructions are compared in the order in which the code lists them, which the compiler keeps for
the parts of a row: loads of a token, statistics, gradient, target. One process runs all checks and
compiles each kernel once.
"""

import functools
import re

import offline
import torch

from benchmarks import aot, aot_cases

V = 151_936
CASES = aot_cases.CASES | {
    "gradient, softcap": functools.partial(aot_cases.launch_logprob, gradient=True, softcap=30.0)
}


@functools.cache
def compile_case(case):
    """(instructions, labels) of a case."""
    launch = functools.partial(CASES[case], torch.bfloat16, V)
    ((_, compiled),) = aot.compile_launches("sm_90", launch)
    return aot.disassemble(compiled)


def places(instructions, *names, bits=None):
    """Indices of the instructions of these names and, if given, of this width."""
    return [
        i
        for i, op in enumerate(instructions)
        if op.is_(*names) and (bits is None or op.bits == bits)
    ]


def wide_loops(instructions, labels):
    """Loops over columns: (of the statistics, of the gradient)."""
    loops = [
        body
        for body in aot.inner_loops(instructions, labels)
        if any(op.is_("LDG") and op.bits == 128 for op in body)
    ]
    stores = [any(op.is_("STG") for op in body) for body in loops]
    statistics = [body for body, does in zip(loops, stores, strict=True) if not does]
    return statistics, [body for body, does in zip(loops, stores, strict=True) if does]


LOSSES = ("loss + gradient", "loss + gradient, entropy bonus", "loss + gradient, softcap")


def stores_of_columns(instructions):
    """Indices of the wide stores of values: `_write_zeros` stores RZ, the register of zeros."""
    wide = places(instructions, "STG", bits=128)
    return [i for i in wide if not instructions[i].operands.endswith("RZ")]


def check_a_row_waits_once_before_it_is_read():
    """All that its token needs is loaded before the row, and before a branch depends on any."""
    for case in ("loss", *LOSSES, "gradient", "gradient, entropy"):
        instructions, _ = compile_case(case)
        loads, of_row = places(instructions, "LDG"), places(instructions, "LDG", bits=128)
        of_token = loads[: len(loads) - len(of_row)]
        assert len(of_token) >= 6 and of_token[-1] < of_row[0], case
        branches = places(instructions, "BRA")
        assert not any(of_token[0] < branch < of_token[-1] for branch in branches), case


def check_barriers_of_a_row():
    """Between statistics and gradient, and between the stores of the columns and the target's."""
    for case in (*LOSSES, "gradient", "gradient, entropy"):
        instructions, _ = compile_case(case)
        barriers, columns = places(instructions, "BAR.SYNC"), stores_of_columns(instructions)
        (target,) = places(instructions, "STG", bits=16)
        assert any(columns[-1] < barrier < target for barrier in barriers), case
        if case in LOSSES:
            reads = places(instructions, "LDG", bits=128)
            last = max(i for i in reads if i < places(instructions, "SHFL")[0])
            assert any(last < barrier < columns[0] for barrier in barriers), case


def check_target_of_a_softcapped_row():
    """In place, a barrier lies between the load of its logit and the first store of a column."""
    instructions, _ = compile_case("gradient, softcap")
    (target,) = places(instructions, "LDG", bits=16)
    barriers, first = places(instructions, "BAR.SYNC"), stores_of_columns(instructions)[0]
    assert any(target < barrier < first for barrier in barriers)


def check_last_column_of_an_odd_vocabulary():
    """Loaded before the other columns are stored, stored after a barrier, as the target."""
    instructions, _ = compile_case("gradient, padded rows")
    (last,) = places(instructions, "LDG", bits=16)
    columns = stores_of_columns(instructions)
    (barrier,) = places(instructions, "BAR.SYNC")
    assert last < columns[0] < columns[-1] < barrier
    assert [i > barrier for i in places(instructions, "STG", bits=16)].count(True) == 2


def offsets(body, name):
    """Constant parts of the addresses of a loop's loads or stores, in their order."""
    found = [re.search(r"\.64(?:\+(-?0x[0-9a-f]+))?\]", op.operands) for op in body if op.is_(name)]
    return [int(match.group(1) or "0", 16) for match in found]


def check_the_second_read_runs_backwards():
    """The statistics run upwards; of the gradient each block lies below the one before."""
    for case in ("loss + gradient", "gradient"):
        statistics, (gradient,) = wide_loops(*compile_case(case))
        for body in statistics:
            starts = offsets(body, "LDG")
            assert starts == sorted(starts) and starts[0] >= 0, case
        for name in ("LDG", "STG"):
            starts = offsets(gradient, name)
            assert len(starts) == 8 and max(starts) < 0, case
            assert max(starts[4:]) < min(starts[:4]), case


def hints(loops, name="LDG"):
    """Cache hints of the wide loads or stores of each loop: EL is evict_last, EF evict_first."""
    opcodes = [[op.opcode for op in body if op.is_(name) and op.bits == 128] for body in loops]
    return [
        {"EL" if ".EL." in opcode else "EF" if ".EF." in opcode else "" for opcode in of_loop}
        for of_loop in opcodes
    ]


def check_cache_hints():
    """A row stays only if its gradient reads it again; what is read or written last goes first."""
    for case in ("statistics", "loss"):
        assert hints(wide_loops(*compile_case(case))[0]) == [{"EF"}], case
    statistics, gradient = wide_loops(*compile_case("loss + gradient"))
    assert sorted(map(sorted, hints(statistics))) == [["EF"], ["EL"]], "without, with a gradient"
    assert hints(gradient) == hints(gradient, "STG") == [{"EF"}]


@offline.offline
def test_machine_code():
    checks = [check for name, check in globals().items() if name.startswith("check_")]
    assert len(checks) == 6
    for check in checks:
        check()


if __name__ == "__main__":
    offline.main(globals())

"""The tables to adapt when files, functions or tests of the project change their names.

Sources are paths below the root of the checkout; tests are stems: `edges` is the one file
tests/**/test_edges.py, wherever it lies. `problems` names every entry that leads nowhere.
"""

import ast
import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# Selections of tests: stems, then -k and an expression as pytest takes it.
QUICK_TESTS = {
    "derivative": "objectives -k derivative",
    "divergence": "objectives -k 'divergences or k3'",
    "objective": "edges objectives",
    "family": "family -k in_torch",
    "rows": "selective_log_softmax -k torch",
    "columns": "selective_log_softmax -k 'triton and (half or blocks or strided or 2049)'",
    "weights": "weights_and_metrics -k 'weights and not triton'",
    "bounds": "edges rows selected_away -k 'not triton'",
    "kernel_bounds": "edges rows weights_and_metrics -k 'not torch and not any_cut'",
    "both": "equalities -k '(two_imp or triton and tensors) and (dapo or gspo)"
    " or two_imp and ipo and not fipo'",
    "upstream": "edges -k 'triton and upstream'",
    "layouts": "layouts -k '1031 and float32 or width or same_gradient or beside'",
    "packing": "packing -k triton",
    "validation": "validation",
    "corrections": "corrections -k 'not ranks'",
    "selections": "selections",
    "kept": "support support_inputs -k 'torch and not compiled'",
    "kept_blocks": "support support_inputs -k 'triton and not compiled'",
    "products": "linear_products -k 'triton and (bf16 or of_exact)'",
    "samplers": "support_inputs -k 'samplers or a_change'",
    "advantages": "advantages multi_advantages",
    "penalty": "kl_penalty",
    "ppo": "ppo value_loss",
    "memory": "memory",
    "sums": "reduce",
    "shards": "merge",
    "graph": "autograd -k 'not triton'",
    "head": "linear linear_penalties -k 'torch and (every_loss or packed or upstream or another_way"
    " or an_advantage or any_number)'",
    "head_cost": "linear_cost linear_products -k 'not triton'",
}
LOSSES = (
    "equalities edges family autograd selected_away masks loss selective_log_softmax extremes "
    "weights_and_metrics invariants far memory objectives launches corrections selections rows "
    "layouts ppo support support_inputs packing reduce merge"
)
SLOW_TESTS = {
    "torch": f"{LOSSES} -k 'not triton'",
    "triton": f"layouts linear_products | family -k in_triton | {LOSSES} -k 'not torch'",
    "memory": "memory",
    "whole": LOSSES,
    "advantages": "advantages multi_advantages ppo edges",
    "penalty": "kl_penalty",
    "ppo": "ppo value_loss edges",
    "head": (
        "linear linear_penalties linear_cost linear_use linear_compile linear_products "
        "-k 'not triton'"
    ),
    "shards": "merge",
}

# Sources that are mutated: the quick tests that kill most of their mutants, then all that could.
KILLERS = {
    "grpo_fused/losses/objectives.py": ("derivative family objective", "whole"),
    "grpo_fused/losses/off_policy_objectives.py": ("derivative family objective", "whole"),
    "grpo_fused/losses/sequence_objectives.py": ("selections family bounds", "torch"),
    "grpo_fused/losses/batch_objectives.py": ("selections family bounds", "torch"),
    "grpo_fused/bundles.py": ("kept family", "torch"),
    "grpo_fused/support.py": ("samplers kept", "torch"),
    "grpo_fused/selections.py": ("selections family", "torch"),
    "grpo_fused/losses/kl.py": ("divergence family bounds", "torch"),
    "grpo_fused/losses/penalty.py": ("penalty", "penalty"),
    "grpo_fused/losses/weights.py": ("weights family bounds", "torch"),
    "grpo_fused/losses/on_logps.py": ("family bounds", "torch"),
    "grpo_fused/losses/metrics.py": ("family bounds", "torch"),
    "grpo_fused/sequences.py": ("ppo family bounds", "torch"),
    "grpo_fused/parallel.py": ("shards", "shards"),
    "grpo_fused/corrections.py": ("corrections bounds", "torch"),
    "grpo_fused/advantages.py": ("advantages ppo", "advantages"),
    "grpo_fused/groups.py": ("advantages", "advantages"),
    "grpo_fused/ppo.py": ("ppo", "ppo"),
    "grpo_fused/arguments.py": ("family bounds validation", "whole"),
    "grpo_fused/torch_backend/rows.py": ("rows family bounds", "torch"),
    "grpo_fused/torch_backend/launchers.py": ("family kept shards rows bounds", "torch"),
    "grpo_fused/torch_backend/support.py": ("kept shards family", "torch"),
    "grpo_fused/torch_backend/pages.py": ("memory", "memory"),
    "grpo_fused/head/chunks.py": ("head head_cost", "head"),
    "grpo_fused/head/launchers.py": ("head head_cost", "head"),
    "grpo_fused/head/order.py": ("head head_cost", "head"),
    "grpo_fused/autograd/head_losses.py": ("head head_cost", "head"),
    "grpo_fused/autograd/common.py": ("kept graph head family", "torch"),
    "kernels/objective.py": ("divergence kernel_bounds derivative", "triton"),
    "kernels/softmax.py": ("both columns kernel_bounds layouts", "triton"),
    "kernels/support.py": ("kept_blocks shards", "triton"),
    "kernels/row_gradient.py": ("both columns kernel_bounds layouts kept_blocks", "triton"),
    "kernels/fused_loss.py": ("both kept_blocks kernel_bounds layouts", "triton"),
    "kernels/token_loss.py": ("both kept_blocks kernel_bounds", "triton"),
    "kernels/logprob.py": (
        "both columns kept_blocks products kernel_bounds shards layouts",
        "triton",
    ),
    "kernels/token_weights.py": ("both kernel_bounds", "triton"),
    "kernels/reduce.py": ("sums both kernel_bounds upstream packing", "triton"),
}

# Left as they are: functions (by how their names begin) that validate, whose messages have tests
# of their own, and functions, keywords and constants that only time depends on.
NOT_FUNCTIONS = ("_check", "check_", "__post_init__", "_is_number", "chunk_rows", "has_gradient")
# Functions that only several processes run: tests/helpers/*_ranks.py.
NOT_FUNCTIONS += ("find_", "is_vocab_parallel", "is_dtensor", "dtensor_group", "_of_dtensor")
NOT_FUNCTIONS += ("_exchange_sizes", "largest_shard", "OverRanks")
NOT_KEYWORDS = {
    *("eviction_policy", "num_warps", "axis", "dim"),
    *("persistent", "min_blocks_per_sm", "unsafe"),
}
NOT_NAMES = {"GAP_ELEMENTS", "BLOCK_BYTES", "COPY_BYTES", "TRANSPOSED_BYTES"}


class Selection(NamedTuple):
    """Test files, as paths below the root, and an expression for -k, or nothing."""

    files: tuple[str, ...]
    expression: str


@cache
def test_file(stem):
    """The one file tests/**/test_<stem>.py, as a path below the root."""
    found = sorted((ROOT / "tests").rglob(f"test_{stem}.py"))
    if len(found) != 1:
        raise LookupError(f"tables.py: {len(found)} files tests/**/test_{stem}.py, one is wanted")
    return found[0].relative_to(ROOT).as_posix()


def selections(text):
    """The selections that a text of the tables spells."""
    for part in text.split(" | "):
        words = shlex.split(part)
        stems, rest = words, []
        if "-k" in words:
            stems, rest = words[: words.index("-k")], words[words.index("-k") + 1 :]
        yield Selection(tuple(map(test_file, stems)), *(rest or [""]))


def quick(path):
    """Selections that kill most mutants of a source, in the order to try them."""
    return [found for name in KILLERS[path][0].split() for found in selections(QUICK_TESTS[name])]


def everything(path):
    """Selections of all tests that could kill a mutant of a source."""
    return list(selections(SLOW_TESTS[KILLERS[path][1]]))


def test_files():
    """All files that the tables of tests name."""
    texts = [*QUICK_TESTS.values(), *SLOW_TESTS.values()]
    return sorted({file for text in texts for part in selections(text) for file in part.files})


def problems():
    """Entries of the tables that lead nowhere, each as a sentence."""
    found = [f"KILLERS: {path} does not exist" for path in KILLERS if not (ROOT / path).is_file()]
    for path, (names, slow) in KILLERS.items():
        unknown = [name for name in names.split() if name not in QUICK_TESTS]
        found += [f"KILLERS: {path}: no {name} in QUICK_TESTS" for name in unknown]
        found += [f"KILLERS: {path}: no {slow} in SLOW_TESTS"] * (slow not in SLOW_TESTS)
    used = {name for names, _ in KILLERS.values() for name in names.split()}
    found += [f"QUICK_TESTS: no source uses {name}" for name in QUICK_TESTS.keys() - used]
    for text in (*QUICK_TESTS.values(), *SLOW_TESTS.values()):
        try:
            list(selections(text))
        except LookupError as error:
            found.append(str(error))
    names = set()
    for path in (*ROOT.glob("grpo_fused/**/*.py"), *ROOT.glob("kernels/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names |= {getattr(node, field, None) for field in ("id", "arg", "attr", "name")}
    names = {name for name in names if isinstance(name, str)}
    known = [x for x in NOT_FUNCTIONS if any(name.startswith(x) for name in names)]
    for unknown in sorted({*NOT_FUNCTIONS, *NOT_KEYWORDS, *NOT_NAMES} - names - set(known)):
        found.append(f"NOT_...: no source has the name {unknown}")
    return sorted(set(found))

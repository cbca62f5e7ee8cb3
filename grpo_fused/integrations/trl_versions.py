"""What differs between versions of TRL, each fact under its own name.

Supported is every minor version from OLDEST to NEWEST: `make trl-matrix` runs the tests with each.
A newer one is taken with a warning, and compared with TRL's own loss: see `trl_compare`.
"""

import functools
import inspect
import warnings

import trl
from packaging.version import Version
from trl import GRPOTrainer

OLDEST, NEWEST = (1, 0), (1, 16)
VERSION = Version(trl.__version__)
IS_NEWER = VERSION.release[:2] > NEWEST

if VERSION.release[:2] < OLDEST:
    raise ImportError(
        "FusedGRPOTrainer overrides private methods of TRL, which version 1.0 has changed: "
        f"it needs trl >= 1.0, got trl {trl.__version__}"
    )
if IS_NEWER:
    warnings.warn(
        f"trl {trl.__version__} is newer than 1.{NEWEST[1]}, the last version that grpo_fused was "
        "tested with: the first micro-batch is compared with TRL's own loss, which is used from "
        "then on if they differ (GRPO_FUSED_COMPARE=0 leaves the comparison out)",
        stacklevel=2,
    )


def _since(*release: int) -> bool:
    return VERSION.release[:2] >= release


# The sum of a token-mean loss is divided by the tokens of one accumulation window; before by those
# of the whole generation batch.
DIVIDES_BY_WINDOW = _since(1, 9)
# Metrics are means over the tokens of all ranks, and extremes those of sequences; before, means of
# the ranks' means, and their extremes.
METRICS_OVER_RANKS = _since(1, 9)
# The metric of VESPO's weights leaves masked tokens out.
PHI_OVER_ACTIVE = _since(1, 9)
# LUSPO sums the active tokens of a sequence; before, it multiplied by their number and averaged
# over all positions, the masked ones too.
LUSPO_SUMS_TOKENS = _since(1, 10)
# The entropy bonus is a mean over tokens for every loss; before, token-mean losses divided it as
# they divide themselves.
BONUS_IS_MEAN = _since(1, 10)
# use_liger_kernel=True selects Liger's loss; later only its layers.
LIGER_HAS_LOSS = hasattr(GRPOTrainer, "compute_liger_loss")

# The private methods that are overridden, with the parameters that the overriding ones rely on.
OVERRIDDEN = {
    "_compute_loss": ("self", "model", "inputs"),
    "_get_per_token_logps_and_entropies": (
        *("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
        "compute_entropy",
    ),
}


@functools.cache
def returns_aux_loss(trainer_class: type) -> bool:
    """Return whether log-probabilities and entropies come with the loss of the router."""
    method = trainer_class._get_per_token_logps_and_entropies  # type: ignore[attr-defined]
    return "compute_aux_loss" in inspect.signature(method).parameters


def why_signatures_differ(trainer_class: type) -> str | None:
    """Return how the private methods of a TRL trainer differ from those known, or None.

    Parameters may follow those known if they have a default, and *args may stand for them.
    """
    for name, known in OVERRIDDEN.items():
        method = getattr(trainer_class, name, None)
        if method is None:
            return f"{trainer_class.__name__} of trl {VERSION} has no method {name}"
        parameters = inspect.signature(method).parameters.values()
        found = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        variable = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        length = len(found) if variable else len(known)
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        required = {p.name for p in parameters if p.default is p.empty and p.kind not in kinds}
        if tuple(found[:length]) != known[:length] or required - set(known):
            return (
                f"{trainer_class.__name__}.{name} of trl {VERSION} has the parameters "
                f"({', '.join(map(str, parameters))}), expected ({', '.join(known)})"
            )
    return None

"""Importing this module calls `patch_verl()`: what verl does in every worker, when told to by

    actor_rollout_ref.model.external_lib=grpo_fused.integrations.verl_patch

or, in every process that imports verl at all, by the environment variable

    VERL_USE_EXTERNAL_MODULES=grpo_fused.integrations.verl_patch
"""

from grpo_fused.integrations.verl_kernels import patch_verl

REPLACED = patch_verl()

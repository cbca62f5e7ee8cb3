"""Call `patch_verl()` on import, so that every worker of verl can be told to do so.

By the configuration of a run:

    actor_rollout_ref.model.external_lib=grpo_fused.integrations.verl_patch

or, in every process that imports verl, by the environment variable

    VERL_USE_EXTERNAL_MODULES=grpo_fused.integrations.verl_patch
"""

from grpo_fused.integrations.verl_kernels import patch_verl

REPLACED = patch_verl()

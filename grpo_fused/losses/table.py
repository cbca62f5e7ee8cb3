"""LOSSES, the table of all losses of the family."""

from dataclasses import dataclass

from grpo_fused.losses.batch_objectives import ClipCov, KlCov, M2po
from grpo_fused.losses.objectives import Cispo, Clip, Objective, PolicyGradient, Sapo
from grpo_fused.losses.off_policy_objectives import (
    DppoKl,
    DppoTv,
    Dro,
    ImportanceSampling,
    Ipo,
    RolloutIs,
)
from grpo_fused.losses.sequence_objectives import Fipo, Gmpo, Topr, Vespo


@dataclass(frozen=True)
class Loss:
    """A row of LOSSES: the defaults of a loss_type.

    Attributes:
        objective: with the parameters of the paper.
        normalizer: a rule of `token_weights`.
        paper, url, equation: the source.
        level: importance sampling level, one of `objectives.LEVELS`.
    """

    objective: Objective
    normalizer: str
    paper: str
    url: str
    equation: str
    level: str = "token"


LOSSES: dict[str, Loss] = {
    "grpo": Loss(
        Clip(),
        "seq-mean-token-mean",
        "DeepSeekMath",
        "https://arxiv.org/abs/2402.03300",
        "eq. 3",
    ),
    "bnpo": Loss(
        Clip(),
        "token-mean-local",
        "TRL",
        "https://huggingface.co/docs/trl/grpo_trainer",
        "loss_type bnpo",
    ),
    "dapo": Loss(
        Clip(epsilon_high=0.28),
        "token-mean",
        "DAPO",
        "https://arxiv.org/abs/2503.14476",
        "eq. 8",
    ),
    "dr_grpo": Loss(
        Clip(),
        "seq-mean-token-sum-norm",
        "Dr. GRPO",
        "https://arxiv.org/abs/2503.20783",
        "section 3.2",
    ),
    # The loss of "grpo"; the algorithms differ in their advantages (`gae_advantages` for PPO).
    "ppo": Loss(
        Clip(),
        "seq-mean-token-mean",
        "PPO",
        "https://arxiv.org/abs/1707.06347",
        "eq. 7",
    ),
    "gspo": Loss(
        Clip(3e-4, 4e-4),
        "seq-mean-token-mean",
        "GSPO",
        "https://arxiv.org/abs/2507.18071",
        "eq. 5 and 7",
        "sequence",
    ),
    "gspo_token": Loss(
        Clip(3e-4, 4e-4),
        "seq-mean-token-mean",
        "GSPO",
        "https://arxiv.org/abs/2507.18071",
        "eq. 13 and 14",
        "sequence_token",
    ),
    "luspo": Loss(
        Clip(),
        "seq-mean-token-sum",
        "LUSPO",
        "https://arxiv.org/abs/2602.05261",
        "the length-unbiased GSPO objective",
        "sequence",
    ),
    "cispo": Loss(
        Cispo(),
        "token-mean",
        "MiniMax-M1",
        "https://arxiv.org/abs/2506.13585",
        "eq. 4 and 5",
    ),
    "sapo": Loss(
        Sapo(),
        "seq-mean-token-mean",
        "SAPO",
        "https://arxiv.org/abs/2511.20347",
        "the soft-gated objective",
    ),
    "vespo": Loss(
        Vespo(),
        "token-mean",
        "VESPO",
        "https://arxiv.org/abs/2602.10693",
        "the gamma-shaped kernel",
    ),
    "gmpo": Loss(
        Gmpo(),
        "seq-mean-token-mean",
        "GMPO",
        "https://arxiv.org/abs/2507.20673",
        "the clipped geometric mean",
        "sequence",
    ),
    "gpg": Loss(
        PolicyGradient(),
        "token-mean",
        "GPG",
        "https://arxiv.org/abs/2504.02546",
        "the policy gradient objective",
    ),
    "dppo_tv": Loss(
        DppoTv(),
        "token-mean",
        "DPPO",
        "https://arxiv.org/abs/2602.04879",
        "eq. 11 to 13",
    ),
    "dppo_kl": Loss(
        DppoKl(),
        "token-mean",
        "DPPO",
        "https://arxiv.org/abs/2602.04879",
        "eq. 11, 12 and 14",
    ),
    "importance_sampling": Loss(
        ImportanceSampling(),
        "token-sum",
        "Tinker",
        "https://tinker-docs.thinkingmachines.ai/losses",
        "importance_sampling",
    ),
    # The loss of "gpg" with another average; the weights of tokens are their advantages.
    "cross_entropy": Loss(
        PolicyGradient(),
        "token-sum",
        "Tinker",
        "https://tinker-docs.thinkingmachines.ai/losses",
        "cross_entropy",
    ),
    # The loss of "gpg" with another average; importance weights are `importance_sampling_ratio`.
    "reinforce": Loss(
        PolicyGradient(),
        "seq-mean-token-sum",
        "REINFORCE",
        "https://doi.org/10.1007/BF00992696",
        "eq. 11",
    ),
    "rollout_is": Loss(
        RolloutIs(),
        "token-mean",
        "GLM-5",
        "https://arxiv.org/abs/2602.15763",
        "section 4.1.2",
    ),
    "dro": Loss(
        Dro(),
        "seq-mean-token-sum",
        "Kimi k1.5",
        "https://arxiv.org/abs/2501.12599",
        "eq. 3, per token",
    ),
    "ipo": Loss(
        Ipo(),
        "token-mean",
        "prime-rl",
        "https://github.com/PrimeIntellect-ai/prime-rl",
        "ipo_loss_fn",
    ),
    "topr": Loss(
        Topr(),
        "seq-mean-token-sum",
        "TOPR",
        "https://arxiv.org/abs/2503.14286",
        "the tapered gradient",
    ),
    "fipo": Loss(
        Fipo(),
        "token-mean",
        "FIPO",
        "https://arxiv.org/abs/2603.19835",
        "eq. 5 to 8",
    ),
    "clip_cov": Loss(
        ClipCov(),
        "token-mean",
        "The Entropy Mechanism",
        "https://arxiv.org/abs/2505.22617",
        "eq. 10 to 12",
    ),
    "kl_cov": Loss(
        KlCov(),
        "token-mean",
        "The Entropy Mechanism",
        "https://arxiv.org/abs/2505.22617",
        "eq. 10, 13 and 14",
    ),
    "m2po": Loss(
        M2po(),
        "token-mean",
        "M2PO",
        "https://arxiv.org/abs/2510.01161",
        "eq. 5 and algorithm 1",
    ),
}

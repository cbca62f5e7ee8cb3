"""TRL's RLOO trainer with the LM head and the loss fused.

Change one import; configuration, metrics and numbers stay those of TRL:

    from grpo_fused.integrations.trl import FusedRLOOTrainer as RLOOTrainer
"""

import torch
from trl import RLOOTrainer

from grpo_fused import Clip, linear_grpo_loss
from grpo_fused.integrations.trl_head import FusedHead, has_other_inputs
from grpo_fused.integrations.trl_metrics import RankSums, clip_counts
from grpo_fused.losses.metrics import SUMS


class FusedRLOOTrainer(FusedHead, RLOOTrainer):
    """`trl.RLOOTrainer` whose loss is `grpo_fused.linear_grpo_loss`: see `FusedGRPOTrainer`.

    The ratio is that of the whole completion, level "sequence_sum"; the KL is part of the reward.

    Arguments, attributes and methods are those of `trl.RLOOTrainer`.

    Raises:
        ValueError: nothing is trainable.
    """

    _sums_log_ratios = True

    def _why_trl_loss(self, inputs) -> str | None:
        return "the inputs are not text only" if has_other_inputs(inputs) else None

    def _fused_loss(self, model, inputs):
        completion_ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        input_ids = torch.cat([inputs["prompt_ids"], completion_ids], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], mask], dim=1)
        advantages, lengths = inputs["advantages"], mask.sum(1)
        # Only their sum over a sequence is known, and counts.
        old_logps = (inputs["old_logps"] / lengths.clamp(min=1))[:, None].expand(mask.shape)
        objective = Clip(self.epsilon_low, self.epsilon_high)

        def head(hidden, weight, **head):
            return linear_grpo_loss(
                hidden,
                weight,
                completion_ids,
                mask,
                advantages,
                old_logps=old_logps,
                loss_type="grpo",
                objective=objective,
                importance_sampling_level="sequence_sum",
                temperature=self.temperature,
                compute_entropy=True,
                upcast=self._upcast,
                **head,
            )

        rows = (model, input_ids, attention_mask, completion_ids.shape[1], head)
        out, aux_loss = self._forward(*rows, aux_loss=self._has_aux_loss)
        sums = dict(zip(SUMS, out.sums.unbind(), strict=True))
        tokens = (out.logps, old_logps, advantages, mask)
        sums |= clip_counts(objective, *tokens, level="sequence_sum")
        if aux_loss is not None:
            sums["aux_loss"] = aux_loss.detach()
        ranks, log = RankSums.gather(self.accelerator, sums), self._metrics[self._mode]
        log["entropy"].append(ranks.mean("entropy", count="tokens"))
        ranks.log_clip_ratios(log)
        # A completion without tokens has the ratio 1 in TRL, and no gradient.
        loss = out.loss - torch.where(lengths == 0, advantages, 0.0).mean()
        if aux_loss is None:
            return loss
        log["aux_loss"].append(ranks.average("aux_loss"))
        return loss + self.router_aux_loss_coef * aux_loss

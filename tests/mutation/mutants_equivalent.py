"""Mutants that no test can tell from the code, by the reason why.

An entry begins with the key of a mutant, which renaming leaves alone (`digests.py`). The rest is
for people: `mutate.py --rekey` writes it anew.
"""

EQUIVALENT = {
    "only time depends on it: nothing comes of rows without a gradient": [
        "8e35a674-ca20 order.order_sequences `Is -> IsNot` if wanted is None:",
    ],
    "an assertion of our own: both are of one length": [
        "e6aff622-227d head_losses.LogpsLosses._chunks `True -> False` ...), groups, strict=True):",
        "db2a9eec-ea12 token_weights.token_weights `True -> False` ...alues, written, strict=True)",
        "106c8a6d-afc0 reduce._tables `True -> False` ...ators = zip(*MEANS.values(), strict=True)",
        "543c588a-d7cc chunks.ChunkedHead.unpack_outputs `True -> False` ... packed, strict=True):",
        "5c228046-5e41 metrics._means `True -> False` ...ct(zip(SUMS, sums.unbind(), strict=True))",
        "2b068389-3b84 metrics.means `True -> False` ...ict(zip(MEANS, _means(sums), strict=True))",
        "543c588a-1aba head_losses.LogpsLosses._finish `True -> False` ...ed, found, strict=True):",
        "2e1bffdd-b999 common.saved `True -> False` ...ip(ctx.numbers, saved[count:], strict=True)",
    ],
    "of equal returns only rounding is left, of 1e-16 of their squares": [
        "71cad55c-96d7 ppo.value_metrics `1e-12 -> 2e-12` ...variance <= 1e-12 * square, 0.0, expl",
    ],
    "any order of tokens will do, and so few sequences are sorted stably in any case": [
        "16e98c56-7f0a order.order_sequences `True -> False` ...(torch.uint8).argsort(stable=True)",
        "1eaf235e-a609 order._order `2 -> 3` rank = 2 - active.to(torch.uint8) - wanted.to(torch.u",
    ],
    "only a GPU takes this branch: test_cuda_linear.py": [
        "fd6dcb86-3b84 chunks.adds_up_in_float32 `NotEq -> Eq` return dtype != torch.float32 and d",
        "05dc7606-3b84 chunks.adds_up_in_float32 `Is -> IsNot` ... 'cuda' and torch.version.hip is",
        "93fa1773-5662 chunks.add_product `not accumulate #2` if accumulate:",
        "cbf2926e-3e83 order.tokens_with_gradient `Is -> IsNot` if sequences.active is None and se",
    ],
    "without an advantage loss and gradient are 0, whatever the knob or the branch": [
        "c086b4c3-f624 objectives.Clip.evaluate `LtE -> Lt` ...torch.where(capped * advantage <= b",
        "d51bfdf8-c54a objectives.Clip.per_token `LtE -> Lt` ... = tl.where(capped * advantage <=",
        "6d8a929c-d9b0 objectives.Sapo.evaluate `Gt -> GtE` t = by_sign(advantage > 0, self.temper",
        "de3e0db9-4e9a objectives.Sapo.per_token `Gt -> GtE` ... = tl.where(advantage > 0.0, tempe",
        "6c1cf863-3f1f sequence_objectives.Vespo.evaluate `GtE -> Gt` positive = advantage >= 0",
        "c123363c-8c70 sequence_objectives.Topr.evaluate `Gt -> GtE` ...torch.where(advantage > 0,",
    ],
    "any name will do that no other class has": [
        "e82fa854-e16c objectives.Objective.__init_subclass__ `Add -> Sub` number += 1",
        "1f6678c2-e16c objectives.Objective.__init_subclass__ `1 -> 2` number += 1",
    ],
    "items are clamped to 1 at least": [
        "94ea49b1-5456 arguments.make_values `1.0 -> 0.0` items = 1.0",
        "bb11baf7-750b arguments.make_values `1.0 -> 0.0` kl = Weight(0.0, 1.0, 1.0)",
        "a82a2e6c-e5a2 weights.rule_weight `1.0 -> 0.0` ...ight(coefficient, 1.0, number * length)",
        "4bb38058-00de weights.rule_weight `1.0 -> 0.0` return Weight(coefficient, 1.0, number)",
        "902001d2-8bba weights.rule_weight `1.0 -> 0.0` return Weight(coefficient, 1.0, 1.0)",
    ],
    "Triton's interpreter, in which the tests run, calls a jit function as a Python function": [
        "e80b3405-749f metrics.total `not HAS_TRITON` ...ction.fn if HAS_TRITON else function for",
    ],
    "what it multiplies is 0 there": [
        "5ea6aadc-4882 on_logps._penalty `0.0 -> 1.0` ... = penalty * torch.where(off, 0.0, ratio)",
    ],
    "on the bound both branches are the same number": [
        "5b91be8c-bce5 kl.k3 `Gt -> GtE` cut = difference > 80.0",
        "4b435feb-86ea objectives.Sapo.per_token `Gt -> GtE` ... = tl.where(ratio > 1.0, large, sm",
        "f3871bba-2957 objective.k3 `Lt -> LtE` near = tl.abs(d) < 1.0",
        "10950f33-17a6 softmax.softcapped `Lt -> LtE` ... = tl.where(v < 0.0, e - 1.0, 1.0 - e) *",
        "4f2d6e46-fe08 rows.write_gradient `LtE -> Lt` unlikely = row.logp <= FLOOR",
        "236f782e-8389 softmax.softmax `Gt -> GtE` logp = tl.where(logp > 0.0, 0.0, logp)",
        "a45185ab-f078 softmax.softmax `Lt -> LtE` entropy = tl.where(entropy < 0.0, 0.0, entropy)",
    ],
    "e^-200 is 0 already": [
        "e14b107c-f60c objectives.Sapo.per_token `200.0 -> 400.0` ...o - 1.0)), -200.0))  # underf",
    ],
    "what is selected away behind it is never read": [
        "ff05981c-3e20 sequence_objectives.Vespo.evaluate `0.0 -> 1.0` ...re(nothing, 0.0, -phi *",
        "64dddb81-0089 support.kept_statistics `0.0 -> 1.0` ... column, known, 0.0).to(tl.float32)",
        "64dddb81-6b1a support.keep_logits `0.0 -> 1.0` ...tr + column, known, 0.0).to(tl.float32)",
        "0012970d-0bb4 support.add_kept_gradient `0.0 -> 1.0` ...oad(kept.logits + k, inside, 0.0)",
    ],
    "a check of ourselves, which never fails": [
        "ffdb1da4-5ef4 ppo.value_metrics `True -> False` ...ined)).float().unbind(), strict=True))",
        "5c228046-8f64 metrics.as_dict `True -> False` ...METRICS, metrics.unbind(), strict=True))",
        "cfb4ebc2-d4e7 launchers.reduce `True -> False` ...((sums, metrics), values, strict=True):",
        "9e6ac2fb-d3d2 rows._matrices `True -> False` ...e else t for t in tensors), strict=True))",
        "543c588a-5ab6 rows.store `True -> False` ..., value in zip(outputs, values, strict=True):",
    ],
    "without sequences there are no tokens": [
        "038adb17-0484 sequences.Packed._sum `0 -> 1 #2` return values[0, :0]",
    ],
    "a column more is read, and neither used nor written": [
        "72fcfef7-46a5 reduce._rescale_kernel `Lt -> LtE` ... + columns, columns < remaining, 0.0)",
        "2f7283db-46a5 reduce._rescale_kernel `0.0 -> 1.0` ... remaining, 0.0).to(tl.float32) * fa",
    ],
    "an empty group more": [
        "c19a4beb-73e7 advantages.process_advantages `1 -> 2` ...Groups(labels, num_sequences + 1)",
        "649e9e9c-de63 advantages.multi_reward_advantages `1 -> 2` ...B * K).flatten(), B * K + 1)",
        "14688ab1-8f35 groups.Groups.__init__ `1 -> 2` ...ge(num_labels + 1, device=labels.device)",
    ],
    "a step as long as the row finds nothing to add": [
        "61c76e43-5efe advantages.suffix_scan `Lt -> LtE` while step < x.shape[1]:",
    ],
    "an int32 shifted by 32 is its sign too": [
        "51bf64c3-3b84 corrections._swap_order `31 -> 32` ...^ ((bits >> 31) & torch.iinfo(torch.i",
    ],
    "it is below the key of -inf, the least there is": [
        "64225c61-307b corrections.entropy_quantile_mask `Sub -> Add` ..._like(rank, -last - 1, dt",
        "db3a814b-307b corrections.entropy_quantile_mask `1 -> 2` ...nk, -last - 1, dtype=torch.in",
    ],
    "no token is divided by a length of 0: there is none": [
        "4d26592c-7a0c weights.rule_weight `1.0 -> 0.0` ...d_length(), 1.0) if length is None else",
    ],
    "e^-80 - 1 is -1 already": [
        "1650283e-4150 kl.k3 `80.0 -> 160.0` ...erence.clamp(-80.0, 80.0))  # accurate for small d",
        "ba3c6475-4150 kl.k3 `no min` ...torch.expm1(difference.clamp(-80.0, 80.0))  # accurate fo",
    ],
    "only the rounding of sums depends on the order within a group": [
        "3bd31f48-b56b groups.Groups.__init__ `True -> False` ...der = labels.argsort(stable=True)",
        "0aac029f-ea88 advantages.process_advantages `True -> False` ...s.sort(dim=1, stable=True)",
    ],
    "only time depends on it: masked rows are computed and selected away": [
        "e1b7bf6b-5ce3 rows.active_rows `Eq -> NotEq` ...is None or (active.device.type == 'cpu' a",
    ],
    "only time depends on it: either way is right": [
        "d1d2d8c7-6d20 head_losses.LogpsLosses._start `Gt -> GtE` ...elf.wanted, middle > start or",
        "f5d5b87f-525f head_losses.LogpsLosses.run `False -> True` ...e, self.wanted, False, like)",
        "b7071e0c-66db softmax.tail_pointers `2 -> 3` if blocks.COLUMNS % 2 == 0:",
        "6980e393-16f8 chunks.ChunkedHead.slice `Or -> And` whole = self.single_chunk or stop - st",
        "da7c1060-3a03 softmax.line_pointers `Gt -> Lt` ... == tl.bfloat16) & (blocks.VECTOR > 1):",
        "ceeb8ebb-3a03 softmax.line_pointers `1 -> 2` ...ty == tl.bfloat16) & (blocks.VECTOR > 1):",
        "c85c42c1-ff70 rows.exp2_ `Div -> Mult` ...m_threads(), math.ceil(size / THREAD_ELEMENTS))",
        "177bb461-676b rows._matrices `Or -> And` if all(t is None or t.stride(0) == t.stride(1) *",
        "4afc3ee0-939c rows.Scratch.__call__ `Lt -> LtE` ....buffers or len(self.buffers[name]) <",
        "be8c0642-0737 launchers.rescale `NotEq -> Eq` if factor.device.type != 'cpu' or factor !=",
        "41703379-d11d rows.centered `Eq -> NotEq` if u.dtype == torch.float32:",
    ],
    "either spelling of a number is right, and as precise": [
        "a8b112a3-13af objective.exp `floor -> ceil` whole = tl.floor(x * 1.4426950408889634 + 0.5",
        "7f02b173-bf64 objective.k3 `10 -> 11` ... 9 * (1 + d / 10 * (1 + d / 11 * (1 + d / 12))))",
        "ee0a653a-bf64 objective.k3 `11 -> 12` ... 9 * (1 + d / 10 * (1 + d / 11 * (1 + d / 12))))",
        "658a31d5-13af objective.exp `Add -> Sub` whole = tl.floor(x * 1.4426950408889634 + 0.5)",
        "e1786cdf-13af objective.exp `0.5 -> 1.0` whole = tl.floor(x * 1.4426950408889634 + 0.5)",
        "61e8fd37-bf64 objective.k3 `Mult -> Div #3` ... / 9 * (1 + d / 10 * (1 + d / 11 * (1 + d",
        "7b3ca8f2-bf64 objective.k3 `Mult -> Div #4` ...1 + d / 10 * (1 + d / 11 * (1 + d / 12))))",
        "01d4238f-bf64 objective.k3 `Add -> Sub #4` ...(1 + d / 10 * (1 + d / 11 * (1 + d / 12))))",
        "f7b7dac3-bf64 objective.k3 `Add -> Sub #5` ...(1 + d / 10 * (1 + d / 11 * (1 + d / 12))))",
        "80e9821b-bf64 objective.k3 `1 -> 2 #5` ...9 * (1 + d / 10 * (1 + d / 11 * (1 + d / 12))))",
        "caf5ad7c-bf64 objective.k3 `12 -> 13` ... 9 * (1 + d / 10 * (1 + d / 11 * (1 + d / 12))))",
        "7cf5bfc0-17b3 softmax.softcapped `315 -> 316` ...+ v2 * (-17 / 315 + v2 * (62 / 2835)))))",
        "06c06852-17b3 softmax.softcapped `62 -> 63` ...5 + v2 * (-17 / 315 + v2 * (62 / 2835)))))",
        "359e36fb-17b3 softmax.softcapped `2835 -> 2836` ...v2 * (-17 / 315 + v2 * (62 / 2835)))))",
        "cc985566-174b softmax.softcapped `Lt -> LtE` ... = tl.where(tl.abs(v) < 0.3, near, far)",
    ],
    "the last block of columns is empty, its mask is too": [
        "44719791-01b6 row_gradient._write_columns `Gt -> GtE` if remaining > 0:",
        "44719791-cfbc softmax.row_statistics `Gt -> GtE` if remaining > 0:",
        "44719791-7337 reduce._rescale_kernel `Gt -> GtE` if remaining > 0:",
        "44719791-dd5c row_gradient._write_zeros `Gt -> GtE` if remaining > 0:",
    ],
    "without them nothing reads it": [
        "97fc6f2b-fcda row_gradient.row_gradient `0.0 -> 1.0` dx_last = 0.0",
        "97fc6f2b-e611 token_loss.token_constants `0.0 -> 1.0` old_logp = 0.0",
        "97fc6f2b-cb6c token_loss.token_constants `0.0 -> 1.0` ref_logp = 0.0",
        "97fc6f2b-0279 token_loss.token_constants `0.0 -> 1.0` sampling_logp = 0.0",
        "97fc6f2b-24ee logprob._logprob_bwd_kernel `0.0 -> 1.0` entropy = 0.0",
        "97fc6f2b-104e logprob._logprob_bwd_kernel `0.0 -> 1.0` maximum = 0.0",
        "94ea49b1-ea23 logprob._logprob_bwd_kernel `1.0 -> 0.0` total = 1.0",
        "97fc6f2b-4074 logprob._logprob_bwd_kernel `0.0 -> 1.0` logp = 0.0",
        "97fc6f2b-0f73 logprob._logprob_bwd_kernel `0.0 -> 1.0` kept_entropy = 0.0",
    ],
    "only a hint for the caches depends on it": [
        "97fc6f2b-09c6 token_loss.token_constants `0.0 -> 1.0` w_kl = 0.0",
        "97fc6f2b-33ae token_loss.token_constants `0.0 -> 1.0` w_entropy = 0.0",
        "7f76cade-6c59 fused_loss._fused_loss_kernel `BitAnd -> BitOr` if (outputs.dlogits is not",
        "fb070009-6c59 fused_loss._fused_loss_kernel `IsNot -> Is` if (outputs.dlogits is not None",
    ],
    "values per token have two dimensions": [
        "d9a995b2-c663 token_weights.token_weights `USub dropped` ... like.shape[-1], num_tokens,",
        "59a2bf7e-3b84 chunks._per_token `0 -> 1` ...ce(values, torch.Tensor) and values.dim() > 0",
        "ed852798-3361 order.tokens_with_gradient `0 -> 1` ...olicy) and tokens.w_policy.dim() > 0",
    ],
    "a weight that is one number is 0 for all tokens or for none": [
        "96f306e2-3361 order.tokens_with_gradient `Gt -> GtE` ...policy) and tokens.w_policy.dim()",
    ],
    "anonymous memory has no file": [
        "eb1f81a1-e46d pages._map `USub dropped` pages = mmap.mmap(-1, size, **private)",
    ],
    "memory that nothing uses": [
        "d026f3b0-812c reduce.reduce `1 -> 2` parts = loss.new_empty(num_parts, len(sums) + 1)",
    ],
    "a number of sums that is a power of 2 fills its lanes": [
        "96b6f3bd-5f2b reduce._reduce_parts_kernel `Lt -> LtE` ..., inside & (places < tables.SUMS",
    ],
    "a tuple of one tensor twice": [
        "080260e5-866b softmax.token_value `0 -> 1` ....load(value[0] + sequence, inside, 0).to(tl",
    ],
    "a barrier does nothing in the interpreter: test_machine_code.py": [
        "64d71d91-5295 logprob._logprob_bwd_kernel `IsNot -> Is` if scales.logit_softcap is not No",
    ],
    "only several processes run it: tests/helpers/sequence_ranks.py and vocab_ranks.py": [
        "19737bdb-7367 on_logps.loss_on_logps `IsNot -> Is` if units is not active and sequences.g",
        "823f50a7-98d4 metrics.without_ratios `Sub -> Add` ...(sums[:kept], (0, len(SUMS) - kept))",
        "7942def9-5592 sequences.OverRanks.counts `Not dropped` if not isinstance(counts, torch.Te",
        "1afdb9dd-1f5c head_losses.LogpsLosses.run `IsNot -> Is #2` ...ot None and gradients.hidde",
        "817da730-3976 arguments.local_logits `USub dropped` ...logits', logits, -1, group, start)",
    ],
    "token-level losses do not ask how many tokens a chunk has": [
        "c5cba3ba-090d head_losses.LogpsLosses._part `Sub -> Add` n = stop - start",
    ],
    "of a masked token: nothing reads it": [
        "97fc6f2b-c96f fused_loss._fused_loss_kernel `0.0 -> 1.0` maximum = 0.0",
        "94ea49b1-7c2d fused_loss._fused_loss_kernel `1.0 -> 0.0` total = 1.0",
        "97fc6f2b-fd15 logprob._logprob_fwd_kernel `0.0 -> 1.0` maximum = 0.0",
        "97fc6f2b-fd15 logprob._logprob_fwd_kernel `0.0 -> 1.0` kept_maximum = 0.0",
        "94ea49b1-4046 logprob._logprob_fwd_kernel `1.0 -> 0.0` total = 1.0",
        "94ea49b1-4848 logprob._logprob_fwd_kernel `1.0 -> 0.0` kept_total = 1.0",
        "97fc6f2b-5d95 fused_loss._fused_loss_kernel `0.0 -> 1.0` kept_maximum = 0.0",
        "94ea49b1-7fd3 fused_loss._fused_loss_kernel `1.0 -> 0.0` kept_total = 1.0",
    ],
    "no logit is below the least of all of them": [
        "93e68e34-5dea support.sampling_support `Lt -> LtE` ...is not None and top_k < x.shape[1]:",
    ],
    "a CPU sorts stably in any case": [
        "9d126b13-2a98 support.sampling_support `True -> False #2` ...escending=True, stable=True)",
        "1101fef9-24d6 selections._ranks `True -> False` ...rt(descending=descending, stable=True)",
    ],
    "every number is a multiple of 1": [
        "8d9604ee-0b90 logprob.gradient_pointer `Gt -> GtE` if blocks.PADDING > 1:",
    ],
    "a row is padded to a multiple of 1 or of 8": [
        "6828cd22-0b90 logprob.gradient_pointer `1 -> 2` if blocks.PADDING > 1:",
    ],
    "of more than four none is read": [
        "32213930-2e6c logprob._logprob_fwd_kernel `4 -> 5` ...statistics[:4], token, (logp, entro",
    ],
    "a masked token has no kept columns": [],
    "0 by a ratio, which is never 0, is 0 too": [
        "c1e35aaa-2344 off_policy_objectives.ImportanceSampling.per_token `Mult -> Div #3` ... adv",
    ],
    "e^-100 is nothing beside the bound that it is compared with": [
        "4bc1f08c-6137 off_policy_objectives.DppoTv.per_token `100.0 -> 200.0` ...ater(logp, -100.",
        "c8297157-6137 off_policy_objectives.DppoTv.per_token `100.0 -> 200.0 #2` ...log_ratio, -1",
        "c683ff91-9b71 off_policy_objectives.DppoKl.per_token `100.0 -> 200.0` ...ater(logp, -100.",
        "458fa4ad-0549 off_policy_objectives.DppoKl.per_token `100.0 -> 200.0` ...log_ratio, -100.",
        "92d5bd98-0bf0 off_policy_objectives.Ipo.per_token `100.0 -> 200.0` ...ater(logp, -100.0))",
        "e927676e-0bf0 off_policy_objectives.Ipo.per_token `100.0 -> 200.0 #2` ...ling_logp, -100.",
    ],
    "the divergence changes by 1e-8 at most: it is multiplied by 1 - p_old": [
        "9f762af1-4ad6 off_policy_objectives.DppoKl.per_token `1e-08 -> 2e-08` ...0 - p_old + 1e-8",
    ],
    "a token that has not moved is never outside": [
        "f0dfbc19-9d7e off_policy_objectives.Ipo.per_token `Gt -> GtE` ... = tl.where(moved > 0.0,",
    ],
    "only a GPU takes this branch: test_linear_products.py on one": [
        "a0a92581-d6fa chunks.project_exactly `IsNot -> Is` if bias is not None:",
        "37f0cce3-d7d2 chunks.project_exactly `Add -> Sub` out += bias",
    ],
    "rows behind those of the chunk are not used": [
        "f1d07d72-79fa launchers.linear_loss `Sub -> Add` ...unked.batch(gradient[: last - start])",
    ],
}

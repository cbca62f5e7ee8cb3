"""Mutants that no test can tell from the code, by the reason why: read by mutate.py.

A mutant is its file, its change and the first 40 characters of its line.
"""

EQUIVALENT = {
    "only time depends on it: nothing comes of rows without a gradient": [
        "kernels/linear_launchers.py `False -> True` for first, last, wanted in ((start, midd",
        "kernels/linear_launchers.py `And -> Or` if writes and middle > start:",
        "kernels/linear_launchers.py `Gt -> GtE` if writes and middle > start:",
        'grpo_fused/ordering.py `Eq -> NotEq` asks = sequences.device.type == "cpu" an',
        "grpo_fused/ordering.py `Is -> IsNot` if live is None:",
        'grpo_fused/ordering.py `Eq -> NotEq` free = sequences.device.type == "cpu" an',
    ],
    "an assertion of our own: both are of one length": [
        "grpo_fused/linear_coupled.py `True -> False` for group, (start, middle, stop) in zip(",
        "grpo_fused/linear_coupled.py `True -> False` for values, source in zip(results, packe",
        "kernels/linear_launchers.py `True -> False` for output, values in zip(outputs, packe",
        "kernels/linear_launchers.py `True -> False #2` for output, values in zip(outputs, packe",
    ],
    "any order of tokens will do, and so few sequences are sorted stably in any case": [
        "grpo_fused/ordering.py `True -> False` return Order(rank.flatten().argsort(stab",
        "grpo_fused/ordering.py `True -> False` index = (sequences.sum(live.float()) == ",
        "grpo_fused/ordering.py `2 -> 3` rank = 2 - active.to(torch.uint8) - want",
    ],
    "only a GPU takes this branch: test_cuda_linear.py": [
        "kernels/linear.py `NotEq -> Eq` return dtype != torch.float32 and device",
        "kernels/linear.py `Is -> IsNot` return dtype != torch.float32 and device",
        "kernels/linear.py `not accumulate #2` if accumulate:",
        "grpo_fused/ordering.py `Is -> IsNot` if sequences.active is None and sequence",
    ],
    "without an advantage loss and gradient are 0, whatever the knob or the branch": [
        "grpo_fused/objectives.py `LtE -> Lt` used = torch.where(free * advantage <= b",
        "grpo_fused/objectives.py `LtE -> Lt` used = tl.where(free * advantage <= boun",
        "grpo_fused/objectives.py `Gt -> GtE` t = by_sign(advantage > 0, self.temperat",
        "grpo_fused/objectives.py `Gt -> GtE` t = tl.where(advantage > 0.0, temperatur",
        "grpo_fused/sequence_objectives.py `GtE -> Gt` positive = advantage >= 0",
    ],
    "any name will do that no other class has": [
        "grpo_fused/objectives.py `Add -> Sub` number += 1",
        "grpo_fused/objectives.py `1 -> 2` number += 1",
    ],
    "on the bound both branches are the same number": [
        "grpo_fused/objectives.py `Gt -> GtE` gate = tl.where(ratio > 1.0, large, smal",
        "kernels/objective.py `Lt -> LtE` near = tl.abs(d) < 1.0",
        "kernels/online_softmax.py `Lt -> LtE` far = tl.where(v < 0.0, e - 1.0, 1.0 - e",
        "kernels/online_softmax.py `Gt -> GtE` return tl.where(logp > 0.0, 0.0, logp)",
        "kernels/online_softmax.py `Lt -> LtE` return tl.where(entropy < 0.0, 0.0, entr",
        "grpo_fused/rows.py `LtE -> Lt` unlikely = row.logp <= FLOOR",
    ],
    "e^-200 is 0 already": [
        "grpo_fused/objectives.py `200.0 -> 400.0` fall = exp(greater(-tl.abs(t * (ratio - ",
    ],
    "what is selected away behind it is never read": [
        "grpo_fused/coupled.py `0.0 -> 1.0` loss = loss * (correction if on is None ",
        "grpo_fused/sequence_objectives.py `0.0 -> 1.0` weight = torch.where(nothing, 0.0, -phi ",
    ],
    "a check of ourselves, which never fails": [
        "grpo_fused/metrics.py `True -> False` named = dict(zip(METRICS, metrics.unbind",
        "grpo_fused/reference.py `True -> False` for output, value in zip((sums, metrics)",
        "grpo_fused/rows.py `True -> False` return list(zip(*([None] * len(tensors[0",
        "grpo_fused/rows.py `True -> False` for output, values in zip(outputs, rows,",
        "grpo_fused/rows.py `True -> False` for output, value in zip(outputs, values",
    ],
    "without sequences there are no tokens": [
        "grpo_fused/sequences.py `0 -> 1 #2` return values[0, :0]",
    ],
    "words at odd addresses: the interpreter reads them too, where a device would fail": [
        "kernels/columns.py `Gt -> GtE` if (x_ptr.dtype.element_ty == tl.bfloat1",
    ],
    "a column more is read, and neither used nor written": [
        "kernels/columns.py `Lt -> LtE` within = block_of(tl.arange(0, LINE), UN",
        "kernels/columns.py `1 -> 2` pairs = tl.multiple_of((remaining + 1) /",
        "kernels/columns.py `Lt -> LtE` within = block_of(tl.arange(0, LINE // 2",
        "kernels/rescale.py `Lt -> LtE` end = tl.load(x_ptr + ends, ends < V, 0.",
        "kernels/rescale.py `0.0 -> 1.0` end = tl.load(x_ptr + ends, ends < V, 0.",
        "kernels/rescale.py `Lt -> LtE` x = tl.load(x_ptr + columns, columns < r",
        "kernels/rescale.py `0.0 -> 1.0` x = tl.load(x_ptr + columns, columns < r",
    ],
    "an empty group more": [
        "grpo_fused/advantages.py `1 -> 2` centred, std, _ = _compare(step_rewards.",
        "grpo_fused/advantages.py `1 -> 2` offsets = torch.arange(num_labels + 1, d",
    ],
    "a step as long as the row finds nothing to add": [
        "grpo_fused/advantages.py `Lt -> LtE` while step < x.shape[1]:",
    ],
    "behind the last token stands T either way": [
        "grpo_fused/advantages.py `True -> False` tokens = torch.where(F.pad(active, (0, 1",
    ],
    "an int32 shifted by 32 is its sign too": [
        "grpo_fused/corrections.py `31 -> 32` return bits ^ ((bits >> 31) & torch.iinf",
    ],
    "all have one shape": [
        "grpo_fused/corrections.py `0 -> 1` return Padded(tensors[0], mask), tensors",
        "grpo_fused/corrections.py `0 -> 1` return Packed(tensors[0], None if mask i",
    ],
    "without a gradient of its own an entropy is multiplied by 0": [
        "kernels/logprob.py `0.0 -> 1.0 #2` entropy = 0.0",
    ],
    "it is below the key of -inf, the least there is": [
        "grpo_fused/corrections.py `Sub -> Add` key = torch.full_like(rank, -last - 1, d",
        "grpo_fused/corrections.py `1 -> 2` key = torch.full_like(rank, -last - 1, d",
    ],
    "no token is divided by a length of 0: there is none": [
        "grpo_fused/weights.py `1.0 -> 0.0` length = max(sequences.padded_length(), ",
    ],
    "less than one item counts as one": [
        "grpo_fused/weights.py `1.0 -> 0.0` return Divisors(1.0, number * length)",
        "grpo_fused/weights.py `1.0 -> 0.0` return Divisors(1.0, number)",
        "grpo_fused/weights.py `1.0 -> 0.0` return Divisors(1.0, 1.0)",
    ],
    "e^-80 - 1 is -1 already": [
        "grpo_fused/divergences.py `80.0 -> 160.0` growth = torch.expm1(difference.clamp(-8",
        "grpo_fused/divergences.py `no min` growth = torch.expm1(difference.clamp(-8",
    ],
    "only the rounding of sums depends on the order within a group": [
        "grpo_fused/advantages.py `True -> False` order = labels.argsort(stable=True)",
        "grpo_fused/advantages.py `True -> False` ends, order = ends.sort(dim=1, stable=Tr",
    ],
    "only time depends on it: masked rows are computed and selected away": [
        "grpo_fused/reference.py `Eq -> NotEq` if active is None or (active.device.type",
    ],
    "only time depends on it: either way is right": [
        "grpo_fused/rows.py `Or -> And` if all(t is None or t.stride(0) == t.str",
        "grpo_fused/rows.py `Lt -> LtE` if name not in self.buffers or len(self.",
        'grpo_fused/reference.py `NotEq -> Eq` if factor.device.type != "cpu" or factor',
        "grpo_fused/rows.py `Eq -> NotEq` if u.dtype == torch.float32:",
        'grpo_fused/rows.py `Lt -> LtE` if logits.device.type != "cpu" or torch.',
    ],
    "either spelling of a number is right, and as precise": [
        "kernels/objective.py `floor -> ceil` whole = tl.floor(x * 1.4426950408889634 ",
        "kernels/objective.py `10 -> 11` series = 1 + d / 8 * (1 + d / 9 * (1 + d",
        "kernels/objective.py `11 -> 12` series = 1 + d / 8 * (1 + d / 9 * (1 + d",
        "kernels/objective.py `Add -> Sub` whole = tl.floor(x * 1.4426950408889634 ",
        "kernels/objective.py `0.5 -> 1.0` whole = tl.floor(x * 1.4426950408889634 ",
        "kernels/objective.py `Mult -> Div #3` series = 1 + d / 8 * (1 + d / 9 * (1 + d",
        "kernels/objective.py `Mult -> Div #4` series = 1 + d / 8 * (1 + d / 9 * (1 + d",
        "kernels/objective.py `Add -> Sub #4` series = 1 + d / 8 * (1 + d / 9 * (1 + d",
        "kernels/objective.py `Add -> Sub #5` series = 1 + d / 8 * (1 + d / 9 * (1 + d",
        "kernels/objective.py `1 -> 2 #5` series = 1 + d / 8 * (1 + d / 9 * (1 + d",
        "kernels/objective.py `12 -> 13` series = 1 + d / 8 * (1 + d / 9 * (1 + d",
        "kernels/columns.py `Gt -> Lt` if (x_ptr.dtype.element_ty == tl.bfloat1",
        "kernels/columns.py `1 -> 2` if (x_ptr.dtype.element_ty == tl.bfloat1",
        "kernels/online_softmax.py `315 -> 316` near = v * (1 + v2 * (-1 / 3 + v2 * (2 /",
        "kernels/online_softmax.py `62 -> 63` near = v * (1 + v2 * (-1 / 3 + v2 * (2 /",
        "kernels/online_softmax.py `2835 -> 2836` near = v * (1 + v2 * (-1 / 3 + v2 * (2 /",
        "kernels/online_softmax.py `Lt -> LtE` tanh = tl.where(tl.abs(v) < 0.3, near, f",
    ],
    "of a masked token: nothing reads it": [
        "kernels/fused_loss.py `0.0 -> 1.0` loss = 0.0",
        "kernels/fused_loss.py `0.0 -> 1.0` kl = 0.0",
        "kernels/fused_loss.py `0.0 -> 1.0` clipped = 0.0",
        "kernels/fused_loss.py `0.0 -> 1.0` ratio = 0.0",
        "kernels/fused_loss.py `1.0 -> 0.0` total = 1.0",
        "kernels/fused_loss.py `0.0 -> 1.0` maximum = 0.0",
        "kernels/logprob.py `0.0 -> 1.0` maximum = 0.0",
        "kernels/logprob.py `1.0 -> 0.0` total = 1.0",
        "kernels/online_softmax.py `USub dropped` target = tl.load(ids_ptr + token, active",
        "kernels/logprob.py `0.0 -> 1.0` entropy = tl.load(entropies_ptr + token,",
        "kernels/logprob.py `0.0 -> 1.0` tl.load(maxima_ptr + token, active, 0.0)",
        "kernels/logprob.py `1.0 -> 0.0` tl.load(totals_ptr + token, active, 1.0)",
        "kernels/logprob.py `0.0 -> 1.0` tl.load(logps_ptr + token, active, 0.0),",
    ],
    "any one of the programs that share a row may do it: all of them would do the same": [
        "kernels/partials.py `Eq -> NotEq` if part == parts - 1:  # the segment of ",
        "kernels/partials.py `1 -> 2` if part == parts - 1:  # the segment of ",
        "kernels/fused_loss.py `Eq -> NotEq` reports &= part == 0",
        "kernels/fused_loss.py `0 -> 1` reports &= part == 0",
    ],
    "whole vectors at any address: the interpreter moves them too, where a device would fail": [
        "kernels/rescale.py `not ENDS` if ENDS:",
    ],
    "the first column of the middle is the first part's either way": [
        "kernels/row_gradient.py `Lt -> LtE` column = tl.where((column < head) | (col",
    ],
    "in the interpreter the threads of a program are in step": [
        "kernels/logprob.py `IsNot -> Is` if softcap is not None:  # in place, a f",
    ],
    "a program more per row finds nothing to do": [
        "kernels/logprob.py `0 -> 1` parts=1 if shared is None else shared[0]",
    ],
    "the last block of columns is empty, its mask is too": [
        "kernels/row_statistics.py `Gt -> GtE` if (blocks < SEGMENT) & (remaining > 0):",
        "kernels/rescale.py `Gt -> GtE` if remaining > 0:",
        "kernels/row_gradient.py `Gt -> GtE` if remaining > 0:",
        "kernels/row_gradient.py `Gt -> GtE` if remaining > 0:",
        "kernels/row_gradient.py `Gt -> GtE #2` if remaining > 0:",
    ],
}

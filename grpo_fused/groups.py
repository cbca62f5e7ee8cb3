"""Groups of completions of one prompt, of any size and in any order, in a flat tensor."""

import torch

from grpo_fused.checks import check_tensor


def group_labels(name, rewards, group_size, group_ids):
    """(B,) int64 in [0, B), equal within a group; `name` is that of the rewards, for errors."""
    if (group_size is None) == (group_ids is None):
        got = "neither" if group_size is None else "both"
        raise ValueError(f"exactly one of group_size and group_ids must be given, got {got}")
    num_sequences = rewards.shape[0]
    if group_ids is None:
        if not isinstance(group_size, int) or group_size < 1:
            raise ValueError(f"group_size must be an integer >= 1, got {group_size!r}")
        if num_sequences % group_size != 0:
            raise ValueError(f"group_size {group_size} does not divide the {num_sequences} {name}")
        return torch.arange(num_sequences, device=rewards.device) // group_size
    check_tensor("group_ids", group_ids, (num_sequences,), rewards.device, integer=True)
    ids = group_ids.long()
    return torch.searchsorted(ids.sort().values, ids)  # first index of the id in sorted order


class Groups:
    """Statistics of groups of N values, each of them repeated for every member: (N,).

    Groups are segments of the values sorted by label: O(N log N), without atomics and, unlike
    torch.unique, without a data-dependent shape.

    Args:
        labels: (N,) int64 in [0, num_labels), equal within a group.

    Attributes:
        counts: (N,) int64, size of the group.
    """

    def __init__(self, labels, num_labels):
        self.labels = labels
        self.order = labels.argsort(stable=True)
        offsets = torch.arange(num_labels + 1, device=labels.device)
        self.offsets = torch.searchsorted(labels[self.order], offsets)  # start of each segment
        self.counts = self.offsets.diff()[labels]

    def sum(self, values):
        """Sum of the group."""
        values = values[self.order]
        return torch.segment_reduce(values, "sum", offsets=self.offsets, unsafe=True)[self.labels]

    def centre(self, values, weights=None):
        """values - mean of the group, exactly 0 in a group of equal values.

        With weights (N,) the mean is weighted; weights that are 0 in a whole group count as equal.
        """
        # Subtracting a member first gives exactly 0 for equal values; the rounded mean does not.
        values = values - values[self.order][self.offsets[self.labels]]
        if weights is None:
            return values - self.sum(values) / self.counts
        totals = self.sum(weights)
        weights = torch.where(totals == 0, 1.0, weights)
        return values - self.sum(weights * values) / torch.where(totals == 0, self.counts, totals)

    def std(self, centred):
        """Unbiased standard deviation (n - 1) of the group, of values that `centre` returned."""
        return (self.sum(centred.square()) / (self.counts - 1).clamp(min=1)).sqrt()

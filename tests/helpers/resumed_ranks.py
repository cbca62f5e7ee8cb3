"""What another number of ranks has saved is resumed: a check of `trainer_parallel_ranks` alone."""

from trainer_parallel_ranks import check_another_number_of_ranks  # noqa: F401

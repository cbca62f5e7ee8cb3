"""The launchers in plain torch: the default on a CPU and on devices without Triton."""

"""Triton kernels: tensors in, tensors out; no autograd, no word of reinforcement learning."""

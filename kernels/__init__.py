"""Triton kernels of the losses, their device functions and launchers; no autograd."""

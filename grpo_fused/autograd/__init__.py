"""The autograd Functions: allocate, launch, save, return."""

"""Triton kernels and their launchers: device code only, no autograd and no choice of backend."""

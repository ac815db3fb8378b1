"""Triton kernels for GPUs; they also run on CPU tensors under Triton's interpreter."""

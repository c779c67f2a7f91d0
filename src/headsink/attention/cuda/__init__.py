"""Triton kernels for GPUs: decode, append, prefill, census statistics."""

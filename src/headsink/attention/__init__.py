"""Attention under a pattern: the reference, the interface to transformers, and the kernel backends (cpu, cuda)."""

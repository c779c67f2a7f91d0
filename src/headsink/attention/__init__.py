"""Attention under a pattern: the reference, the transformers interface, and the kernel backends (cpu, cuda)."""

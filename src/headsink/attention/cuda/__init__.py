"""GPU kernels: decode, append, prefill and census statistics in Triton, and full attention by other libraries."""

"""A model under a plan: `apply`, `compress`, prefill, prefix files."""

"""Run a model under a plan: `apply`, prefill compression, prefix files, scoring of continuations."""

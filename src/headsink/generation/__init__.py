"""Decoding under a plan: compiled decode steps, self-speculative decoding, generation with timings, chat."""

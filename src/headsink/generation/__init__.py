"""Decoding: compiled steps, self-speculative decoding, generation with timings, chat."""

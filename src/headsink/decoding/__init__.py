"""Compiled decode steps: one token for every sequence of a cache in one call."""

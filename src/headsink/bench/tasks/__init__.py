"""Benchmark tasks: data sets, prompts, scoring, and a sandbox for generated code."""

"""Benchmarks of headsink against transformers, llama.cpp and vLLM."""

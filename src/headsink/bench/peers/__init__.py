"""Peer engines that benchmarks run for comparison: llama.cpp and vLLM."""

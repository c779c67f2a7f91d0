"""What is compiled for a CPU, by numba: one token through a model, attention of few tokens and of many."""

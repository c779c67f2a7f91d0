"""CPU kernels, compiled by numba: a decode step through the whole model, decode attention, prefill attention."""

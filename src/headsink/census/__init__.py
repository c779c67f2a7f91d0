"""Statistics of every attention head: sink, local and far attention, roles, secondary sinks, comparisons of runs."""

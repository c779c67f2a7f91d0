"""A plan: one eviction pattern per KV head of a model, with its measured quality."""

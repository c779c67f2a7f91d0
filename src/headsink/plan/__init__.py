"""A plan: one eviction pattern per KV head of a model, and its measured quality."""

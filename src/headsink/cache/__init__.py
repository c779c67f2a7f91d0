"""The KV cache of a plan: slots, groups of KV heads with the same pattern, layers, and the transformers `Cache`."""

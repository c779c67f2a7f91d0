"""The KV cache of a plan: slots, groups of KV heads that share a pattern, layers, the transformers `Cache`."""

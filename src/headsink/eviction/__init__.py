"""KV cache eviction: the pattern of a KV head, importance scores, and the step at which each key is evicted."""

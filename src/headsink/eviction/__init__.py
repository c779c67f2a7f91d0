"""KV cache eviction: the pattern of a KV head, importance scores, and when a key is evicted."""

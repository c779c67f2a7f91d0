"""Families that the compiled step decodes."""

DECODED = ("llama", "llama-mha", "qwen2", "qwen3", "mistral")

"""Compression of a prompt that has been read: continuations over its cache, context reconstruction."""

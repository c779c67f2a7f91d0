"""Models: loading, built-in names, architecture (`spec`), fingerprints, sharded weights, rotary positions."""

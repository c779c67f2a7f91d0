"""Context reconstruction (KVzip) of a cached prompt, and continuations on a cached prefix."""

"""Context reconstruction (KVzip) and value refitting for a cached prompt, and continuations on a cached prefix."""

"""How prompts are read and cached: the checks of `prefill`, `chunk_size` and `kv_dtype`. Does not import torch."""

from __future__ import annotations

from headsink.errors import HeadsinkError

KV_DTYPES = ("auto", "int8", "k8v4")  # of cached keys and values (attention/formats.py)


def check_prefill(prefill: str, chunk_size: int | None, name: str = "chunk_size") -> None:
    """Raise HeadsinkError for values that `headsink.new_cache` does not take. name: of the argument or option `chunk_size`."""
    if prefill not in ("dense", "sparse"):
        raise HeadsinkError(f"prefill: {prefill!r} is neither 'dense' nor 'sparse'")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise HeadsinkError(f"{name}: {chunk_size!r} is not a whole number of tokens, 1 or more")
    if chunk_size is not None and prefill == "sparse":
        raise HeadsinkError(f"{name}: sparse prefill evicts at every token; leave {name} out")


def check_kv_dtype(kv_dtype: str, name: str = "kv_dtype") -> None:
    """Raise HeadsinkError for a value that `headsink.new_cache` does not take. name: of the argument or option."""
    if kv_dtype not in KV_DTYPES:
        raise HeadsinkError(f"{name}: {kv_dtype!r} is none of {', '.join(KV_DTYPES)}; auto is the model's dtype")

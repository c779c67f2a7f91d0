"""Compress a document: read it once into a KV cache that keeps what a plan keeps."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.formats import KVDtype
from headsink.attention.interface import GAPS, left_padding
from headsink.cache.cache import PlanCache
from headsink.errors import HeadsinkError
from headsink.models.spec import describe
from headsink.plan.plan import Plan
from headsink.runtime.apply import check_mask, new_cache
from headsink.runtime.prefill import prefill


def compress(
    model: PreTrainedModel,
    plan: Plan,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    reconstruct: bool = False,
    kv_dtype: KVDtype = "auto",
) -> PlanCache:
    """Read documents in full attention and evict all keys that `plan` does not keep. Returns the cache.

    Use the cache inside `apply(model, plan)`, for as many questions as you like: `copy.deepcopy` it for each, or save it with
    `headsink.save_prefix`.

    input_ids: int64 [batch, tokens]. attention_mask: int [batch, tokens], 0 for left padding. reconstruct: choose keys by
    context reconstruction, a second forward pass over the documents, and refit the kept keys
    (compression/reconstruction.py). It takes three to four times as long, needs the memory of the full cache meanwhile, and
    keeps the most answers. Otherwise every layer evicts right after its own attention, and refits keys on the prompt's own
    queries. kv_dtype: as for `new_cache`. Raises HeadsinkError if the plan was made for another model, for documents over the
    model's maximum, for an empty document, and for a mask of another shape or with right padding.
    """
    if input_ids.dim() != 2 or not input_ids.shape[1]:
        raise HeadsinkError(
            f"input_ids: {list(input_ids.shape)} given; compress takes [batch, tokens], one token or more"
        )
    cache = new_cache(model, plan, exact=False, kv_dtype=kv_dtype)
    plan.check_length(input_ids.shape[1], describe(model).max_context)
    check_mask(attention_mask, *input_ids.shape)
    padding = left_padding(attention_mask)
    if padding is not None and padding.hidden is not None:
        raise HeadsinkError(GAPS)
    prefill(model, plan, input_ids, mask=attention_mask, cache=cache, reconstruct=reconstruct)
    return cache

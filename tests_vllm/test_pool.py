"""The memory of the slab: what comes out of it, in every dtype of models and of KV caches, and attention with sink logits."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import fp8
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from headsink.attention.reference import masked_attention
from headsink.serving.vllm.fp8 import FP8
from headsink.serving.vllm.slab_attention import Round, attend
from headsink.serving.vllm.slab_pool import Pool

current_platform.import_kernels()
DIM, BLOCKS, HEADS, GROUP = 32, 8, 2, 3
# vLLM's kernels compute in the dtype of the model
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
KINDS = [
    pytest.param(*kind, marks=fp8 if kind[1] in FP8 else ()) for kind in product(BOUNDS, ["auto", "fp8", "fp8_e5m2"])
]


def pool_of(dtype, cache_dtype, block=32):
    stored = torch.uint8 if cache_dtype in FP8 else dtype
    cache = torch.zeros(BLOCKS, HEADS, block, 2 * DIM, dtype=stored)
    layer = SimpleNamespace(kv_cache=cache, kv_cache_dtype=cache_dtype)
    return Pool([layer], block, _get_attn_isa(dtype, block, DIM, cache_dtype), 4, dtype)


def is_nearest(found, numbers, cache_dtype):
    """Whether no other float with 8 bits is nearer."""
    values = torch.arange(256, dtype=torch.uint8).view(FP8[cache_dtype]).float()
    values, found, numbers = values[values.isfinite()], found.float(), numbers.float()
    return torch.isin(found, values).all() and torch.equal(
        (found - numbers).abs(), (values - numbers[..., None]).abs().amin(-1)
    )


@pytest.mark.parametrize(("dtype", "cache_dtype"), KINDS)
@pytest.mark.parametrize("block", [32, 128])
def test_keys_come_out_as_they_went_in_up_to_rounding(dtype, cache_dtype, block):
    pool = pool_of(dtype, cache_dtype, block)
    slots = torch.randperm(len(pool.rows))[:100]
    key, value = (torch.randn(2, 100, 1, DIM) * torch.logspace(-4, 2, 100)[:, None, None]).to(dtype)
    key[0, 0, 0] = 1e4  # beyond the largest float with 8 bits of e4m3
    pool.write(key, value, slots)
    found = pool.read(slots)
    given = torch.cat([key, value], -1)[:, 0]
    assert is_nearest(found, given, cache_dtype) if cache_dtype in FP8 else torch.equal(found, given)
    others = torch.randperm(len(pool.rows))[:100]
    pool.move(slots, others)
    assert torch.equal(pool.read(others), found)
    assert pool.pages.element_size() == (1 if cache_dtype in FP8 else dtype.itemsize)


@pytest.mark.parametrize(("dtype", "cache_dtype"), KINDS)
@pytest.mark.parametrize("learned", [False, True], ids=["", "sink logits"])
def test_attention_over_the_pool_equals_the_reference(dtype, cache_dtype, learned):
    """Two sequences of 3 and 40 keys, of which the last 2 and 5 are new."""
    pool, tokens, lengths = pool_of(dtype, cache_dtype), [2, 5], [3, 40]
    scaling, total = DIM**-0.5, sum(tokens)
    pages = torch.randperm(len(pool.pages))[: HEADS * 4].view(HEADS, 2, 2)
    sink_logits = torch.randn(HEADS * GROUP) * 2 if learned else None
    query = torch.randn(total, HEADS * GROUP, DIM).to(dtype)
    keys, values = torch.randn(2, HEADS, 2, 40, DIM).to(dtype)
    key, value = (
        torch.cat(
            [of[:, row, length - new : length] for row, (new, length) in enumerate(zip(tokens, lengths, strict=True))],
            1,
        )
        for of in (keys, values)
    )  # [KV heads, new tokens, dim]
    at = torch.arange(40)
    slots = pages[..., at // 32] * 32 + at % 32  # [KV heads, sequences, 40]
    for head, row in product(range(HEADS), range(2)):
        old = lengths[row] - tokens[row]
        pool.write(keys[head, row, :old, None], values[head, row, :old, None], slots[head, row, :old])
    one = Round(
        None,
        pages.flatten(0, 1)[None].int(),
        torch.tensor(lengths * HEADS).int()[None],
        torch.cat([slots[:, row, lengths[row] - tokens[row] : lengths[row]] for row in range(2)], 1)[None],
        torch.tensor([0, *(tokens * HEADS)]).cumsum(0).int(),
        torch.empty(0),
    )
    found = attend(pool, one, 0, query, key.transpose(0, 1), value.transpose(0, 1), scaling, sink_logits)
    found, begin = found.view(total, HEADS * GROUP, DIM).float(), 0
    for row, (new, length) in enumerate(zip(tokens, lengths, strict=True)):
        mask = torch.ones(new, length, dtype=torch.bool).tril(length - new)
        for head in range(HEADS):
            rows = slice(head * GROUP, (head + 1) * GROUP)
            own = (pool.rounded(of[head, row, :length]).float()[None, None] for of in (keys, values))
            queries = query[begin : begin + new, rows].float().transpose(0, 1)[None]
            extra = None if sink_logits is None else sink_logits[rows]
            expected = masked_attention(queries, *own, mask, scaling, sink_logits=extra)[0].transpose(0, 1)
            assert (found[begin : begin + new, rows] - expected).abs().max() < BOUNDS[dtype]
        begin += new

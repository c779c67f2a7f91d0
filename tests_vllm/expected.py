"""Expected outputs of vLLM: the model in transformers, with every head masked to the blocks of its grouping."""

import sys
from contextlib import contextmanager

import pytest
import reference
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from headsink.attention import reference as reference_module
from headsink.attention.reference import masked_attention
from headsink.models.distributed import rank_heads
from headsink.models.spec import describe
from headsink.serving.vllm.blocks import visible
from headsink.serving.vllm.groups import choose, widest_first

_running = []


def grouping(model, plan, block, context=1024, ranks=1):
    shape = describe(model)
    return choose(plan, shape.windows, block, context, 2 * shape.head_dim * 4, ranks)


def kept_by_head(plan, found, ranks=1):
    """Return Blocks [layers][KV heads], None for a sliding-window layer."""
    kept = []
    for heads, units in zip(plan.layers, found.units, strict=True):
        row = None if heads is None else [None] * len(heads)
        for mine in rank_heads(plan.model.kv_heads, ranks) if row is not None else ():
            order = widest_first([head.pattern for head in heads], mine)
            for unit, n in enumerate(order):
                row[mine[n]] = units[unit]
        kept.append(row)
    return kept


def _stored(numbers):
    return numbers


def _attention(module, query, key, value, attention_mask, scaling=None, s_aux=None, **_):
    (kept, block), heads = _running[-1], key.shape[1]
    key, value = _stored(key), _stored(value)
    positions, group = torch.arange(key.shape[2]), query.shape[1] // heads
    output = torch.empty_like(query)
    for head, blocks in enumerate(kept[module.layer_idx] or [None] * heads):
        rows, one = slice(head * group, (head + 1) * group), slice(head, head + 1)
        mask = attention_mask if blocks is None else visible(blocks, block, positions, positions)
        sink_logits = None if s_aux is None else s_aux[rows]
        output[:, rows] = masked_attention(
            query[:, rows], key[:, one], value[:, one], mask, scaling, sink_logits=sink_logits
        )
    return output.transpose(1, 2), None


AttentionInterface.register("blocks_reference", _attention)
AttentionMaskInterface.register("blocks_reference", sdpa_mask)


@contextmanager
def masked(model, plan, block, context=1024, ranks=1):
    before = model.config._attn_implementation
    model.set_attn_implementation("blocks_reference")
    _running.append((kept_by_head(plan, grouping(model, plan, block, context, ranks), ranks), block))
    try:
        yield
    finally:
        _running.pop()
        model.set_attn_implementation(before)


@contextmanager
def truncated(dtype):
    """Let `masked` drop the bits of keys and values that a dtype with 8 bits does not have, as vLLM's kernels do."""

    def stored(numbers):
        near = numbers.to(dtype)
        return torch.where(near.to(numbers).abs() > numbers.abs(), (near.view(torch.uint8) - 1).view(dtype), near).to(
            numbers
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "_stored", stored)
        yield


@contextmanager
def in_8_bits(dtype, first=0):
    """Let `reference.masked` round keys and values to the nearest floats of a dtype with 8 bits, as they enter the cache.

    first: tokens of a prefix, which attended to each other before they were rounded.
    """
    given, most = reference.reference_attention, torch.finfo(dtype).max

    def rounded(numbers):
        return numbers.clamp(-most, most).to(dtype).to(numbers.dtype)

    def attend(query, key, value, *rest):
        *rest, _ = rest
        key, value = (torch.cat([of[:, :, :first], rounded(of[:, :, first:])], 2) for of in (key, value))
        return given(query, key, value, *rest, True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_module, "_rounded", rounded)
        patch.setattr(reference, "reference_attention", attend)
        yield


@torch.no_grad()
def logprobs(model, ids):
    """[tokens, vocabulary]"""
    return model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def differences(model, output):
    """Return the differences between vLLM's log-probabilities and those of the masked model."""
    prompt, answer = output.prompt_token_ids, output.outputs[0]
    expected = logprobs(model, [*prompt, *answer.token_ids])
    given = [(n - 1, row) for n, row in enumerate(output.prompt_logprobs or []) if row]
    given += [(len(prompt) - 1 + n, row) for n, row in enumerate(answer.logprobs)]
    assert given
    return [abs(expected[place, token] - found.logprob).item() for place, row in given for token, found in row.items()]


def worst(model, output):
    """Return the largest of `differences`."""
    return max(differences(model, output))

"""Full causal attention by other libraries: FlashAttention-3 or -2, flashinfer, or PyTorch.

All are exact and align the queries with the last keys. The fastest installed one is used, in the order of `KERNELS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]
HOPPER = (9, 0)  # compute capability that FlashAttention-3 needs


def _flash(module: str) -> Kernel:
    def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        by_token = (t.transpose(1, 2) for t in (query, keys, values))
        found = import_module(module).flash_attn_func(*by_token, softmax_scale=scaling, causal=True)
        # early versions of 3 also return the log-sum-exp
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output.transpose(1, 2)

    return attend


def _flashinfer(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    library, options = import_module("flashinfer"), {"kv_layout": "HND", "sm_scale": scaling}
    outputs = []
    for q, k, v in zip(query, keys.contiguous(), values.contiguous(), strict=True):
        if query.shape[2] == 1:
            found = library.single_decode_with_kv_cache(q[:, 0], k, v, use_tensor_cores=True, **options)[None]
        else:
            found = library.single_prefill_with_kv_cache(q.transpose(0, 1).contiguous(), k, v, causal=True, **options)
        outputs.append(found)
    return torch.stack(outputs).transpose(1, 2)


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    tokens, n_keys = query.shape[2], keys.shape[2]
    # A single query sees every key, so no mask is needed.
    mask = None if tokens in (1, n_keys) else causal_lower_right(tokens, n_keys)
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=tokens == n_keys > 1, scale=scaling, enable_gqa=True
    )


KERNELS: dict[str, Kernel] = {
    "flash_attn_interface": _flash("flash_attn_interface"),
    "flash_attn": _flash("flash_attn"),
    "flashinfer": _flashinfer,
    "sdpa": _sdpa,
}


@cache
def available_kernels() -> tuple[str, ...]:
    """Return the names of the available kernels, the fastest first."""
    found = [name for name in KERNELS if name == "sdpa" or find_spec(name) is not None]
    if "flash_attn_interface" in found and not (
        torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER
    ):
        found.remove("flash_attn_interface")
    return tuple(found)


def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attend from the last tokens, each over all keys up to its own.

    query: [batch, heads x group, tokens, dim]; keys, values: [batch, heads, keys, dim]. Returns [batch, heads x group,
    tokens, dim].
    """
    name = available_kernels()[0] if query.dtype in (torch.bfloat16, torch.float16) else "sdpa"
    return KERNELS[name](query, keys, values, scaling)

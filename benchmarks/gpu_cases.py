"""Single layers for gpu.py: patterns of different sizes, timed kernels, and their errors against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import LlamaConfig, LlamaForCausalLM

from headsink.attention.cuda import full, prefill
from headsink.attention.cuda.common import processors
from headsink.attention.cuda.decode import attend, attend_buffers
from headsink.attention.cuda.prefill import attend as attend_many
from headsink.attention.int8 import dequantize, quantize
from headsink.attention.interface import AttentionRecord
from headsink.attention.kv_table import KVField
from headsink.attention.reference import masked_attention
from headsink.attention.visibility import KeyVisibility
from headsink.census.head_statistics import Thresholds, head_statistics
from headsink.eviction.pattern import FULL, Pattern
from headsink.eviction.scorers import LINEAR
from headsink.models.transformers_names import cache_argument
from headsink.plan.plan import Plan
from headsink.runtime.apply import apply, new_cache
from headsink.utils import device as gpu

SINK = 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative error of the whole output


class Heads(NamedTuple):
    """Numbers of query heads and KV heads of a layer, and the head dimension."""

    query: int
    kv: int
    dim: int


MODELS = {"Llama-3.1-8B": Heads(32, 8, 128), "Llama-3.2-1B": Heads(32, 8, 64)}
REHEARSED = Heads(4, 2, 64)


def sizes(budget: float, context: int, heads: int) -> list[int]:
    """Return the number of keys of each KV head: each half of the previous one, in sum `budget` of the full cache."""
    kept, left = [context] * heads, round(budget * context * heads)
    low, high = 0.0, 2.0**heads
    for _ in range(60):  # bisect the first head's size, as a multiple of the context
        middle = (low + high) / 2
        kept = [min(context, max(64, int(context * middle / 2**n))) for n in range(heads)]
        low, high = (middle, high) if sum(kept) < left else (low, middle)
    return kept


def patterns(budget: float, context: int, heads: int) -> list[Pattern]:
    """Return patterns of `sizes`: sink tokens, and half of the rest each as top-k keys and window."""
    found = []
    for size in sizes(budget, context, heads):
        rest = max(0, min(size, context) - SINK)
        found.append(FULL if size >= context else Pattern(SINK, rest // 2, rest - rest // 2))
    return found


@cache
def full_kernels(device: torch.device) -> dict[str, str | None]:
    """Check the installed kernels of other libraries for full attention: the error of each, None if it is usable."""
    found: dict[str, str | None] = {}
    for name in full.available_kernels():
        try:
            errors = [_full_error(device, torch.bfloat16, dim, name) for dim in (64, 128)]
            found[name] = None if max(errors) <= TOLERANCE[torch.bfloat16] else f"it is wrong by {max(errors):.1e}"
        except Exception as error:  # any error of another library: its kernel cannot be measured here
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def usable(device: torch.device) -> list[str]:
    return [name for name, error in full_kernels(device).items() if error is None]


def decode_kernel(
    clock: Any, shape: Heads, context: int, batch: int, budgets: Sequence[float], copy_rate: float
) -> list[dict[str, Any]]:
    """Time decode attention of one layer at several budgets, and full attention by other libraries.

    copy_rate: the card's copy bandwidth, bytes per second.
    """
    device, scaling = clock.device, shape.dim**-0.5
    room = 4 * 2 * batch * shape.kv * context * shape.dim
    if device.type == "cuda" and room > 0.8 * torch.cuda.mem_get_info()[0]:
        return [{"not measured": "it does not fit into the card's memory"}]
    query = torch.randn(batch, shape.query, 1, shape.dim, device=device, dtype=torch.bfloat16)
    keys, values = torch.randn(2, batch, shape.kv, context, shape.dim, device=device, dtype=torch.bfloat16)
    visible = torch.ones(batch, shape.kv, context, dtype=torch.bool, device=device)
    rows = []
    for name in usable(device):
        seconds = clock.kernel(lambda name=name: full.KERNELS[name](query, keys, values, scaling))  # type: ignore[misc]
        bytes_ = keys.numel() * 2 * keys.element_size()
        rows.append({"way": f"full by {name}", "seconds": seconds, "of_copy": bytes_ / seconds["median"] / copy_rate})
    if device.type == "cuda":
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            seconds = clock.kernel(
                lambda: F.scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=True)
            )
        rows.append({"way": "full by sdpa's flash", "seconds": seconds})
    caches = {"headsink": (keys, values), "headsink, int8": tuple(quantize(states) for states in (keys, values))}
    number = torch.arange(batch * shape.kv, device=device).view(batch, -1)
    for budget in budgets:
        table = torch.zeros(batch, shape.kv, len(KVField), dtype=torch.int64, device=device)
        table[..., KVField.VISIBLE] = visible.data_ptr() + visible.stride(1) * number
        kept = torch.tensor(sizes(budget, context, shape.kv), device=device)
        table[..., KVField.WINDOW] = kept
        length = torch.tensor([context - 1], device=device)
        for name, buffers in caches.items():
            for field, buffer in zip((KVField.KEYS, KVField.VALUES), buffers, strict=True):
                table[..., field] = buffer.data_ptr() + buffer.stride(1) * buffer.element_size() * number
            int8 = name != "headsink"
            seconds = clock.kernel(
                lambda table=table, length=length, int8=int8: attend(query, table, length, scaling, int8=int8)  # type: ignore[misc]
            )
            bytes_ = batch * int(kept.sum()) * (2 * buffers[0].shape[3] * buffers[0].element_size() + 1)
            rows.append(
                {
                    "way": name,
                    "budget": budget,
                    "kept": int(kept.sum()) / shape.kv / context,
                    "seconds": seconds,
                    "of_copy": bytes_ / seconds["median"] / copy_rate,
                }
            )
    return rows


def prefill_kernel(clock: Any, shape: Heads, context: int, budgets: Sequence[float]) -> list[dict[str, Any]]:
    """Time prefill attention of one layer: full attention by other libraries, and headsink with sinks, window and top-k keys."""
    device, scaling = clock.device, shape.dim**-0.5
    query = torch.randn(1, shape.query, context, shape.dim, device=device, dtype=torch.bfloat16)
    keys, values = torch.randn(2, 1, shape.kv, context, shape.dim, device=device, dtype=torch.bfloat16)
    rows, area, best = [], context * (context + 1) / 2, None
    for name in usable(device):
        seconds = clock.kernel(lambda name=name: full.KERNELS[name](query, keys, values, scaling), 5)  # type: ignore[misc]
        rows.append({"way": f"full by {name}", "seconds": seconds})
        best = seconds["median"] if best is None else best
    if device.type == "cuda":
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            try:
                with sdpa_kernel(backend):
                    seconds = clock.kernel(
                        lambda: F.scaled_dot_product_attention(
                            query, keys, values, is_causal=True, scale=scaling, enable_gqa=True
                        ),
                        5,
                    )
            except RuntimeError as error:
                rows.append({"way": f"full by sdpa's {name}", "not measured": str(error).splitlines()[0]})
                continue
            rows.append({"way": f"full by sdpa's {name}", "seconds": seconds})
            best = seconds["median"] if name == "flash" else best
    assert best is not None
    columns = torch.arange(context, device=device)
    for budget in budgets:
        window = round(budget * context)
        for top_k in (0, window // 2):
            near = window - SINK - top_k
            until = (columns + near).int().expand(shape.kv, -1).clone()
            until[:, :SINK] = context
            if top_k:  # a key stays `top_k` tokens after it leaves the window, so that `top_k` are visible at once
                until[:, SINK:] += top_k
            sight = KeyVisibility(until, 0, 0, 0, near, False, SINK + top_k, context if top_k else SINK)
            seconds = clock.kernel(
                lambda sight=sight: attend_many(query, keys[0], values[0], sight, scaling),  # type: ignore[misc]
                5,
            )
            seen = float((columns + 1).clamp(max=window).sum())
            rows.append(
                {
                    "way": "headsink",
                    "window": near,
                    "top_k": top_k,
                    "area": seen / area,
                    "seconds": seconds,
                    "of_what_the_area_predicts": seconds["median"] / (best * seen / area),
                }
            )
    return rows


def flex_attention_prefill(clock: Any, shape: Heads, context: int, budget: float) -> list[dict[str, Any]]:
    """Time sink tokens and a window by PyTorch's FlexAttention with a block mask, and by headsink's kernel."""
    device, scaling, window = clock.device, shape.dim**-0.5, round(budget * context) - SINK
    query = torch.randn(1, shape.query, context, shape.dim, device=device, dtype=torch.bfloat16)
    keys, values = torch.randn(2, 1, shape.kv, context, shape.dim, device=device, dtype=torch.bfloat16)

    def mask(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((q - k < window) | (k < SINK))

    cuda = device.type == "cuda"
    blocks = create_block_mask(mask, None, None, context, context, device=device, _compile=cuda)
    flex = torch.compile(flex_attention, dynamic=False) if cuda else flex_attention
    until = (torch.arange(context, device=device) + window).int().expand(shape.kv, -1).clone()
    until[:, :SINK] = context
    sight = KeyVisibility(until, 0, 0, 0, window, False, SINK, SINK)
    kernels: dict[str, Callable[[], Any]] = {
        "flex_attention": lambda: flex(query, keys, values, block_mask=blocks, scale=scaling, enable_gqa=True),
        "headsink": lambda: attend_many(query, keys[0], values[0], sight, scaling)[0],
    }
    difference = _relative(kernels["headsink"](), kernels["flex_attention"]().double())
    return [
        {"way": name, "window": window, "seconds": clock.kernel(run, 5), "difference": difference}
        for name, run in kernels.items()
    ]


def tuning(clock: Any, shape: Heads, context: int) -> list[dict[str, Any]]:
    """Time other launch shapes: programs per multiprocessor of decode attention, tiles of prefill attention."""
    device, scaling, rows = clock.device, shape.dim**-0.5, list[dict[str, Any]]()
    query = torch.randn(1, shape.query, context, shape.dim, device=device, dtype=torch.bfloat16)
    keys, values = torch.randn(2, 1, shape.kv, context, shape.dim, device=device, dtype=torch.bfloat16)
    visible, last = torch.ones(1, shape.kv, context, dtype=torch.bool, device=device), query[:, :, -1:].contiguous()
    for programs in (1, 2, 3, 4):
        count = programs * processors(device)
        seconds = clock.kernel(
            lambda count=count: attend_buffers(last, keys, values, visible, context, scaling, programs=count)  # type: ignore[misc]
        )
        rows.append({"programs a multiprocessor": programs, "seconds": seconds})
    sight = KeyVisibility(
        torch.arange(context, device=device).int().expand(shape.kv, -1) + 4096, 0, 0, 0, 4096, False, 0, 0
    )
    for tile in (prefill.Shape(128, 64, 8, 3), prefill.Shape(128, 128, 8, 2), prefill.Shape(64, 64, 4, 3)):
        seconds = clock.kernel(
            lambda tile=tile: attend_many(query, keys[0], values[0], sight, scaling, tile=tile),  # type: ignore[misc]
            5,
        )
        rows.append({"tile": str(tile), "seconds": seconds})
    return rows


def census_of_a_layer(clock: Any, shape: Heads, context: int) -> list[dict[str, Any]]:
    """Time the census statistics of a layer, and its attention."""
    device = clock.device
    query, output = torch.randn(2, 1, shape.query, context, shape.dim, device=device, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, shape.kv, context, shape.dim, device=device, dtype=torch.bfloat16)
    module = nn.Module()
    module.o_proj = nn.Linear(shape.query * shape.dim, shape.query * shape.dim, bias=False).to(device, torch.bfloat16)
    module.layer_idx, module.config = 0, LlamaConfig(num_attention_heads=shape.query, num_key_value_heads=shape.kv)
    seen = AttentionRecord(module, 0, query, key, value, shape.dim**-0.5, output=output)
    statistics = clock.host(lambda: head_statistics(seen, context, Thresholds()), 1 if context < 1000 else 3)
    attention = clock.kernel(lambda: full.attend(query, key, value, shape.dim**-0.5), 5)
    return [{"tokens": context, "statistics": statistics, "attention": attention}]


def largest_errors(device: torch.device, small: bool) -> list[dict[str, Any]]:
    """Compare every kernel with float64 on random input: norm of the difference relative to the norm of the reference."""
    found = []
    for dtype in TOLERANCE:
        for dim in (64, 128):
            for name, error in (
                ("decode attention", _decode_error(device, dtype, dim, 1)),
                ("attention of five tokens", _decode_error(device, dtype, dim, 5)),
                ("decode attention in 8 bits", _decode_error(device, dtype, dim, 1, True)),
                ("prefill attention", _prefill_error(device, dtype, dim, 80 if small else 700)),
                ("attention over everything", _full_error(device, dtype, dim, "sdpa")),
            ):
                what = f"{name}, {str(dtype).removeprefix('torch.')}, heads of {dim}"
                found.append({"what": what, "error": error, "right": error <= TOLERANCE[dtype]})
    error = _model_error(device, 40 if small else 300)
    return [*found, {"what": "a model by the step, float32", "error": error, "right": error <= 1e-4}]


def _relative(found: Tensor, expected: Tensor) -> float:
    error = (found.double() - expected).norm() / expected.norm()
    return float(error) if bool(found.isfinite().all()) else float("inf")


def _decode_error(device: torch.device, dtype: torch.dtype, dim: int, tokens: int, int8: bool = False) -> float:
    kept, group, batch = [7, 130, 1000], 4, 2
    keys, values = torch.randn(2, batch, 3, 1000, dim, device=device).to(dtype)
    query = torch.randn(batch, 3 * group, tokens, dim, device=device).to(dtype)
    visible, cached = torch.rand(batch, 3, 1000, device=device) < 0.9, (keys, values)
    if int8:
        cached = quantize(keys), quantize(values)
        keys, values = (dequantize(rows, torch.float32) for rows in cached)
    table = torch.zeros(batch, 3, len(KVField), dtype=torch.int64, device=device)
    expected = torch.empty_like(query, dtype=torch.float64)
    for head, size in enumerate(kept):
        for row in range(batch):
            for field, buffer in ((KVField.KEYS, cached[0]), (KVField.VALUES, cached[1]), (KVField.VISIBLE, visible)):
                table[row, head, field] = buffer[row, head].data_ptr()
        table[:, head, KVField.WINDOW] = size
        slots = torch.arange(size, device=device)
        mask = visible[:, head, None, :size] & (slots <= slots[size - tokens :, None])
        own = slice(head * group, (head + 1) * group)
        logits = query[:, own].double() @ keys[:, head, :size].double().transpose(-1, -2)[:, None] * dim**-0.5
        shares = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
        expected[:, own] = shares @ values[:, head, None, :size].double()
    length = torch.tensor([1000 - tokens], device=device)
    return _relative(attend(query, table, length, dim**-0.5, int8=int8)[0], expected)


def _prefill_error(device: torch.device, dtype: torch.dtype, dim: int, tokens: int) -> float:
    keys, values = torch.randn(2, 2, tokens, dim, device=device).to(dtype)
    query = torch.randn(1, 8, tokens, dim, device=device).to(dtype)
    columns, near, top_k = torch.arange(tokens, device=device), 33, 9
    until = (columns + near + top_k).expand(2, -1).clone()
    until[:, :SINK] = tokens
    sight = KeyVisibility(until, 0, 0, 0, near, False, SINK + top_k, tokens)
    mask = (columns <= columns[:, None]) & (columns[:, None] < until[:, None])
    logits = query.double().view(2, 4, tokens, dim) @ keys.double()[:, None].transpose(-1, -2) * dim**-0.5
    shares = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return _relative(
        attend_many(query, keys, values, sight, dim**-0.5)[0], (shares @ values.double()[:, None]).view_as(query)
    )


def _full_error(device: torch.device, dtype: torch.dtype, dim: int, name: str) -> float:
    """Return the error of full attention whose queries are the last of the keys."""
    keys, values = torch.randn(2, 2, 2, 500, dim, device=device).to(dtype)
    query = torch.randn(2, 8, 77, dim, device=device).to(dtype)
    mask = torch.arange(500, device=device) <= torch.arange(500 - 77, 500, device=device)[:, None]
    parts = (
        masked_attention(*(t.double() for t in head), mask, dim**-0.5)
        for head in zip(query.split(4, 1), keys.split(1, 1), values.split(1, 1), strict=True)
    )
    expected = torch.cat(list(parts), 1)
    return _relative(full.KERNELS[name](query, keys, values, dim**-0.5), expected)


def _model_error(device: torch.device, tokens: int) -> float:
    """Return the error of a model under a plan, with kernels and the CUDA-graph decode step, against plain PyTorch."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = LlamaForCausalLM(config).to(device).eval()
    plan = Plan.of(
        model,
        [[Pattern(3, 5, 9), FULL], [Pattern(2, 0, 20), Pattern(1, 11, 4)]],
        torch.randn(2, 2, LINEAR.n_features(64)),
    )
    ids = torch.randint(3, 300, (2, tokens + 8), device=device)
    logits = {}
    devices = gpu.DEVICES
    for where in (set[str](), devices):
        gpu.DEVICES = where
        with torch.no_grad(), apply(model, plan, compiled=False):
            cache = new_cache(model, plan)
            found = [model(ids[:, :tokens], **cache_argument(cache)).logits[:, -1]]
            if where:
                from headsink.decoding.cuda import Decoder

                step = Decoder(model, cache)
                found += [step.run(ids[:, n]) for n in range(tokens, tokens + 8)]
            else:
                for n in range(tokens, tokens + 8):
                    found.append(model(ids[:, n : n + 1], **cache_argument(cache)).logits[:, -1])
        logits[bool(where)] = torch.stack(found)
    return _relative(logits[True], logits[False].double())

"""Generate text with or without a plan and measure TTFT, time per token and the memory of the KV cache.

To use a plan, `model.generate` inside `headsink.apply` is enough. This module adds the timing and the checks that the command
line needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from headsink.attention.formats import KVDtype
from headsink.cache.cache import PlanCache, nbytes
from headsink.decoding.step import prepare, refusal
from headsink.errors import HeadsinkError
from headsink.generation.lossless import generate_lossless
from headsink.generation.prompt import cached_padding
from headsink.generation.sequences import Speculation
from headsink.models.distributed import input_device
from headsink.models.spec import describe
from headsink.models.transformers_names import cache_argument
from headsink.plan.plan import Plan
from headsink.runtime.apply import apply
from headsink.runtime.options import check_kv_dtype
from headsink.runtime.prefill import empty_cache, prefill, prefill_chunks


@dataclass(frozen=True)
class Generation:
    """A continuation and its cost.

    first_token_s: TTFT in seconds. steps_s: seconds of each token after the first. kv_bytes: bytes of the KV cache at the end, of
    both caches in lossless mode. acceptance: in lossless mode, the share of drafted tokens that were accepted; None if none was
    drafted.
    """

    text: str
    ids: list[int]
    prompt_tokens: int
    first_token_s: float
    steps_s: list[float]
    kv_bytes: int
    acceptance: float | None = None

    @property
    def token_s(self) -> float | None:
        """Mean seconds per token after the first, None if there are none."""
        return sum(self.steps_s) / len(self.steps_s) if self.steps_s else None


class _Clock(BaseStreamer):
    """Streamer that records when tokens arrive and passes new complete text to `show`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None] | None):
        self.tokenizer, self.show = tokenizer, show
        self.times: list[float] = []
        self.ids: list[int] = []
        self.shown = 0
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:  # `generate` passes the prompt first
            self.prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.ids += value.flatten().tolist()
        if self.show and not (text := self.text()).endswith("\ufffd"):  # an incomplete character
            self.show(text[self.shown :])
            self.shown = len(text)

    def end(self) -> None:
        if self.show and len(text := self.text()) > self.shown:
            self.show(text[self.shown :])

    def text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    plan: Plan | None = None,
    *,
    cache: Cache | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    show: Callable[[str], None] | None = None,
    compiled: bool = True,
    lossless: bool = False,
    reconstruct: bool = False,
    kv_dtype: KVDtype = "auto",
    **options: Any,
) -> Generation:
    """Continue `ids`, greedily or by sampling, under a plan or without.

    cache: continue a cache that holds a prefix of `ids`; its own plan applies. temperature: 0 for greedy decoding. show: called
    with each new piece of text. compiled: under a plan, use headsink's kernels and the compiled decode step if they
    support the model. lossless: speculative decoding (`generate_lossless`). reconstruct: compress the
    prompt by context reconstruction, as `headsink.compress` does. kv_dtype: as for `new_cache`, of the draft in lossless mode;
    without a plan, "int8" and "k8v4" keep every key. options: passed on to `model.generate`. Raises HeadsinkError for an empty
    prompt or one that does not fit the model.
    """
    if not ids:
        raise HeadsinkError("prompt: it is empty")
    if max_new_tokens < 1:
        raise HeadsinkError(f"max_new_tokens: {max_new_tokens} is below 1")
    longest = describe(model).max_context
    check_kv_dtype(kv_dtype)
    if plan is None and kv_dtype != "auto":
        plan = Plan.full(model)
    cache = empty_cache(model, plan, exact=not compiled, kv_dtype=kv_dtype) if cache is None else cache
    streaming = isinstance(cache, PlanCache) and cache.plan.positions == "cache-relative"
    if len(ids) + max_new_tokens > longest and not streaming:
        raise HeadsinkError(
            f"prompt: {len(ids)} tokens and {max_new_tokens} new ones are over the model's maximum of {longest}"
        )
    clock = _Clock(tokenizer, show)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    text = torch.tensor([ids], device=input_device(model))
    if cache.get_seq_length() and getattr(cache, "rows", 1) != 1:
        raise HeadsinkError(f"cache: it holds {cache.rows} sequences; give the cache of one")  # type: ignore[attr-defined]
    if cached_padding(cache) is not None:
        raise HeadsinkError("cache: it holds a padded batch; give the cache of one sequence without padding")
    if lossless:
        if cache.get_seq_length():
            raise HeadsinkError("lossless: it makes its own caches; give none")
        options |= sampling | {"kv_dtype": kv_dtype}
        return _lossless(model, plan, text, clock, max_new_tokens=max_new_tokens, **options)
    compiled = compiled and isinstance(cache, PlanCache) and refusal(model, cache.plan) is None
    if compiled:
        prepare(model, cache.kv_dtype)  # type: ignore[attr-defined]
    start = time.perf_counter()
    if reconstruct and isinstance(cache, PlanCache) and not cache.get_seq_length():
        prefill(model, cache.plan, text[:, :-1], cache=cache, reconstruct=True)
    reading = time.perf_counter() - start
    with nullcontext() if plan is None else apply(model, plan, compiled=compiled):
        start = time.perf_counter() - reading  # that plan and model belong together is seen to once, not for every text
        if plan is not None:
            prefill_chunks(model, cache, text)
        model.generate(
            text,
            attention_mask=torch.ones_like(text),
            **cache_argument(cache),
            max_new_tokens=max_new_tokens,
            streamer=clock,
            **sampling,
            **options,
        )
    return _generation(clock, ids, start, nbytes(cache))


def _lossless(model: PreTrainedModel, plan: Plan | None, text: Tensor, clock: _Clock, **options: Any) -> Generation:
    counts, start = Speculation(), time.perf_counter()
    mask = torch.ones_like(text)
    generate_lossless(model, plan, text, attention_mask=mask, streamer=clock, speculation=counts, **options)
    return _generation(clock, text[0], start, counts.kv_bytes, counts.acceptance)


def _generation(
    clock: _Clock, prompt: Sized, start: float, kv_bytes: int, acceptance: float | None = None
) -> Generation:
    steps = [later - earlier for earlier, later in pairwise(clock.times)]
    return Generation(clock.text(), clock.ids, len(prompt), clock.times[0] - start, steps, kv_bytes, acceptance)

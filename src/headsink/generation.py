"""Generate text with or without a plan and measure it: time to the first token, time per token, memory of the cache.

`model.generate` inside `headsink.apply` is all that is needed to use a plan; this adds the clock and the checks that the
command line wants.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from headsink.cache import PlanCache, nbytes
from headsink.decode import decode, prepare, refusal
from headsink.errors import HeadsinkError
from headsink.plan import Plan
from headsink.prompt import padding_of
from headsink.runtime import apply, compress_into, full_cache, new_cache
from headsink.speculate import Speculation, generate_lossless
from headsink.transformers_names import cache_argument

CHUNK = 8192  # tokens of a prompt that are read at once: a streaming head never holds more than its window and these
MARK = "\ue000"  # of the characters for private use: where a document ends within the chat format


@dataclass(frozen=True)
class Generated:
    """A continuation and what it took. Times in seconds; kv_bytes is what the cache holds at the end, in lossless mode both.
    acceptance: in lossless mode, the share of drafted tokens that were the model's own; None if none was drafted."""

    text: str
    ids: list[int]
    prompt_tokens: int
    first_token_s: float
    steps_s: list[float]  # of each token after the first
    kv_bytes: int
    acceptance: float | None = None

    @property
    def token_s(self) -> float | None:
        """Mean time of the tokens after the first, None if there are none."""
        return sum(self.steps_s) / len(self.steps_s) if self.steps_s else None


class _Clock(BaseStreamer):
    """Notes when tokens arrive and hands on the text that is complete so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None] | None):
        self.tokenizer, self.show = tokenizer, show
        self.times: list[float] = []
        self.ids: list[int] = []
        self.shown = 0
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:  # `generate` begins by giving the prompt
            self.prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.ids += value.flatten().tolist()
        if self.show and not (text := self.text()).endswith("\ufffd"):  # half a character so far
            self.show(text[self.shown :])
            self.shown = len(text)

    def end(self) -> None:
        if self.show and len(text := self.text()) > self.shown:
            self.show(text[self.shown :])

    def text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))


def empty_cache(model: PreTrainedModel, plan: Plan | None, exact: bool = True) -> Cache:
    """A cache for the plan (`new_cache`), or transformers' own if there is none."""
    if plan is None:
        return DynamicCache(config=model.config.get_text_config(decoder=True))
    return new_cache(model, plan, exact)


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
    **options: Any,
) -> Generated:
    """Continue `ids`, greedily or by sampling at a temperature, under a plan or without.

    If `plan.once`, the prompt, of a conversation the first, is read in full and compressed once (runtime.compress).
    cache: continue one that holds a prefix of `ids` (its plan counts). show: called with each new piece of text.
    compiled: under a plan, attend by our kernels and decode by our own step (decode.py), where those can run the model.
    lossless: the plan only drafts (speculate.py). options: passed on to `model.generate`. Raises HeadsinkError for an empty
    prompt or one that does not fit the model.
    """
    if not ids:
        raise HeadsinkError("prompt: it is empty")
    if max_new_tokens < 1:
        raise HeadsinkError(f"max_new_tokens: {max_new_tokens} is none")
    longest = model.config.get_text_config(decoder=True).max_position_embeddings
    cache = empty_cache(model, plan, exact=not compiled) if cache is None else cache
    endless = isinstance(cache, PlanCache) and cache.plan.positions == "cache"
    if len(ids) + max_new_tokens > longest and not endless:
        raise HeadsinkError(
            f"prompt: {len(ids)} tokens and {max_new_tokens} new ones are over the model's maximum of {longest}"
        )
    clock = _Clock(tokenizer, show)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    text = torch.tensor([ids], device=model.device)
    if cache.get_seq_length() and getattr(cache, "rows", 1) != 1:
        raise HeadsinkError(f"cache: it holds {cache.rows} texts; give the cache of one")  # type: ignore[attr-defined]
    if padding_of(cache) is not None:
        raise HeadsinkError("cache: it holds a padded batch; give the cache of one text without padding")
    if lossless:
        if plan is None or cache.get_seq_length():
            raise HeadsinkError("lossless: give a plan that drafts, and no cache")
        return _lossless(model, plan, text, clock, max_new_tokens=max_new_tokens, **sampling, **options)
    if compiled and isinstance(cache, PlanCache) and refusal(model) is None:
        options = {"custom_generate": decode, **options}
        prepare(model)
    start = time.perf_counter()
    if isinstance(cache, PlanCache) and cache.plan.once and not cache.get_seq_length():
        _read(model, cache, text[:, :-1])
    reading = time.perf_counter() - start
    with nullcontext() if plan is None else apply(model, plan):
        start = time.perf_counter() - reading  # that plan and model belong together is seen to once, not for every text
        if plan is not None:
            _read_long(model, cache, text)
        model.generate(
            text,
            attention_mask=torch.ones_like(text),
            **cache_argument(cache),
            max_new_tokens=max_new_tokens,
            streamer=clock,
            **sampling,
            **options,
        )
    times = clock.times
    return Generated(
        text=clock.text(),
        ids=clock.ids,
        prompt_tokens=len(ids),
        first_token_s=times[0] - start,
        steps_s=[later - earlier for earlier, later in pairwise(times)],
        kv_bytes=nbytes(cache),
    )


def _lossless(model: PreTrainedModel, plan: Plan, text: Tensor, clock: _Clock, **options: Any) -> Generated:
    told, start = Speculation(), time.perf_counter()
    mask = torch.ones_like(text)
    generate_lossless(model, plan, text, attention_mask=mask, streamer=clock, speculation=told, **options)
    return Generated(
        text=clock.text(),
        ids=clock.ids,
        prompt_tokens=text.shape[1],
        first_token_s=clock.times[0] - start,
        steps_s=[later - earlier for earlier, later in pairwise(clock.times)],
        kv_bytes=told.kv_bytes,
        acceptance=told.acceptance,
    )


def _read_long(model: PreTrainedModel, cache: Cache, text: Tensor) -> None:
    """Read a long prompt in pieces, but for the last one. transformers' own `prefill_chunk_size` forgets what a cache holds."""
    with torch.no_grad():
        for part in text[:, cache.get_seq_length() :].split(CHUNK, 1)[:-1]:
            model(part, **cache_argument(cache), use_cache=True, logits_to_keep=1)


def _read(model: PreTrainedModel, cache: PlanCache, text: Tensor) -> None:
    """Read in full, and compress once, what comes before the last token of the prompt, which `generate` begins with."""
    if not text.shape[1]:
        cache.hold()
        return
    full = empty_cache(model, None)
    with torch.no_grad(), full_cache(model):
        model(text, **cache_argument(full), use_cache=True, logits_to_keep=1)
    compress_into(cache, model, full, input_ids=text)


def read(model: PreTrainedModel, plan: Plan, ids: list[int]) -> PlanCache:
    """What a plan keeps of a text, with all of its tokens read. Raises HeadsinkError if it does not fit the model."""
    longest = model.config.get_text_config(decoder=True).max_position_embeddings
    if len(ids) > longest and plan.positions == "text":
        raise HeadsinkError(f"prompt: {len(ids)} tokens are over the model's maximum of {longest}")
    cache, text = new_cache(model, plan), torch.tensor([ids], device=model.device)
    if plan.once:
        _read(model, cache, text)
        return cache
    with torch.no_grad(), apply(model, plan):
        model(text, **cache_argument(cache), use_cache=True, logits_to_keep=1)
    return cache


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """Tokens of a text, special: with those that begin one. Raises HeadsinkError for what is no text."""
    half = next((n for n, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    if half is not None:
        raise HeadsinkError(
            f"prompt: character {half + 1} is U+{ord(text[half]):04X}, half of a character; give text that was read as UTF-8"
        )
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def document_prompt(tokenizer: PreTrainedTokenizerBase, document: str, raw: bool = False) -> tuple[str, list[int]]:
    """What comes before any question about a document: text and tokens, in the model's chat format if it has one."""
    if raw or tokenizer.chat_template is None:
        return document, encode(tokenizer, document, special=True)
    text = chat_prompt(tokenizer, [{"role": "user", "content": document + MARK}]).rpartition(MARK)[0]
    return text, encode(tokenizer, text)


def question_prompt(tokenizer: PreTrainedTokenizerBase, before: str, question: str) -> list[int]:
    """Tokens of a question that comes after the text of `document_prompt`, in the format that this has."""
    text = f"\n\n{question}"
    if tokenizer.chat_template is not None:
        start, _, rest = chat_prompt(tokenizer, [{"role": "user", "content": MARK + text}]).partition(MARK)
        text = rest if start and before.startswith(start) else text
    return encode(tokenizer, text)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The conversation as text, ready for the model's answer, in its own chat format."""
    if tokenizer.chat_template is None:
        raise HeadsinkError("this model has no chat format: it continues text but was not made to chat")
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


class Conversation:
    """Many turns over one cache: each turn feeds only what is new.

    `plan` None is the model itself.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan | None, **options: Any):
        self.model, self.tokenizer, self.plan, self.options = model, tokenizer, plan, options
        self.messages: list[dict[str, str]] = []
        self.ids: list[int] = []  # all tokens of the conversation so far, the model's own as it gave them
        self.text = ""  # the same as text, so that the next turn's prompt can be cut where it begins
        self.cache = self._empty_cache()

    def _empty_cache(self) -> Cache:
        return empty_cache(self.model, self.plan, exact=not self.options.get("compiled", True))

    def ask(self, question: str, show: Callable[[str], None] | None = None) -> Generated:
        """One turn. On an error or ctrl-C the conversation stays as it was before the turn, with a fresh cache."""
        if not question.strip():
            raise HeadsinkError("prompt: it is empty")
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = chat_prompt(self.tokenizer, messages)
        if self.text and prompt.startswith(self.text):
            ids = self.ids + encode(self.tokenizer, prompt[len(self.text) :])
        else:  # the chat format rewrites what was said: read it anew
            ids, self.cache = encode(self.tokenizer, prompt), self._empty_cache()
        try:
            answer = generate(self.model, self.tokenizer, ids, self.plan, cache=self.cache, show=show, **self.options)
        except BaseException:
            self.cache, self.ids, self.text = self._empty_cache(), [], ""
            raise
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self.ids = ids + answer.ids
        self.text = prompt + str(self.tokenizer.decode(answer.ids))
        return answer

"""Multi-turn chat over one KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from headsink.errors import HeadsinkError
from headsink.generation.generate import Generation, generate
from headsink.generation.templates import chat_prompt, encode
from headsink.plan.plan import Plan
from headsink.runtime.prefill import empty_cache


class Conversation:
    """A conversation over one cache: each turn feeds only its new tokens.

    plan: None for the full cache. options: passed on to `generate`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan | None, **options: Any):
        if plan is None and options.get("kv_dtype", "auto") != "auto":
            plan = Plan.full(model)
        self.model, self.tokenizer, self.plan, self.options = model, tokenizer, plan, options
        self.messages: list[dict[str, str]] = []
        self.ids: list[int] = []  # all tokens of the conversation so far, answers as they were generated
        self.text = ""  # the same as text, to find what the next prompt adds
        self.cache = self._empty_cache()

    def _empty_cache(self) -> Cache:
        how: dict[str, Any] = {
            "exact": not self.options.get("compiled", True),
            "kv_dtype": self.options.get("kv_dtype", "auto"),
        }
        return empty_cache(self.model, self.plan, **how)

    def ask(self, question: str, show: Callable[[str], None] | None = None) -> Generation:
        """Run one turn. On an error or ctrl-C the messages stay as they were before the turn, and the cache starts empty."""
        if not question.strip():
            raise HeadsinkError("prompt: it is empty")
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = chat_prompt(self.tokenizer, messages)
        if self.text and prompt.startswith(self.text):
            ids = self.ids + encode(self.tokenizer, prompt[len(self.text) :])
        else:  # the chat template rewrites earlier turns: prefill all of it again
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

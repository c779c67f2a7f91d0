"""Compiled decoding: one compiled call per token on a CPU (step_cpu.py), a CUDA graph on a GPU (step_cuda.py).

    model.generate(**inputs, custom_generate=headsink.decode)      # inside `with headsink.apply(model, plan):`

transformers prepares the call and provides the logits processors and stopping criteria. Only the forward passes of single
tokens, one per sequence, are replaced; the model prefills the prompt. `refusal` gives the reason why a model is not supported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.backends import backend_of
from headsink.cache.cache import KVDtype, PlanCache
from headsink.errors import HeadsinkError
from headsink.generation.prompt import Prompt, cached_padding, check_call
from headsink.models.distributed import input_device
from headsink.models.transformers_names import generate_argument, given_cache, returned_cache
from headsink.plan.plan import Plan
from headsink.utils import device


class Decoder(Protocol):
    """A compiled decode step for a model and a cache. Call `resume` after any other code has changed the cache."""

    def run(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Append one token per sequence, int64 [sequences]. positions: by default they follow the cached tokens.

        Returns the logits of the next tokens, float32 [sequences, vocabulary].
        """

    def start_evicting(self) -> None:
        """Update the cache's lengths with the tokens that were appended."""

    def resume(self) -> None:
        """Continue after other code has changed the cache."""


def _backend(model: PreTrainedModel) -> Any:
    if input_device(model).type in device.DEVICES:
        from headsink.generation import step_cuda

        return step_cuda
    from headsink.generation import step_cpu

    return step_cpu


def refusal(model: PreTrainedModel, plan: Plan | None = None) -> str | None:
    """Why a model has no compiled decode step on this machine, or no plan of this kind; None if it has one."""
    kind = input_device(model).type
    backend = backend_of(kind)
    if plan is not None and plan.has_top_k and backend is not None and plan.scorer not in backend.scorers:
        return f"the plan's scorer {plan.scorer!r} has no kernel"
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != model.dtype:
        return "it does not support torch.autocast; convert the model with model.to(dtype) instead"
    reason: str | None = _backend(model).refusal(model)
    return reason


def prepare(model: PreTrainedModel, kv_dtype: KVDtype = "auto") -> None:
    """Compile the decode step of a model: half a minute the first time on a machine, then loaded from a cache."""
    _backend(model).prepare(model, kv_dtype)


def decoder(model: PreTrainedModel, cache: PlanCache) -> Decoder:
    """A decode step for a model and a filled cache. Raises HeadsinkError with the reason if there is none (`refusal`)."""
    if reason := refusal(model, cache.plan):
        raise HeadsinkError(f"decode: {reason}")
    step: Decoder = _backend(model).Decoder(model, cache)
    return step


@contextmanager
def open_decoder(model: PreTrainedModel, cache: PlanCache) -> Iterator[Decoder]:
    """Decode token by token into a cache inside the block. After the block the cache is up to date."""
    step = decoder(model, cache)
    try:
        yield step
    finally:
        step.start_evicting()


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor:
    """A decoding loop for `model.generate(custom_generate=headsink.decode)`, greedy or sampling.

    The model prefills the prompt with all arguments of `generate`, images too. transformers does not pass the tokenizer for stop
    strings to a custom loop: pass a `StopStringCriteria` instead.

    input_ids: int64 [sequences, tokens], padded on the left with `attention_mask`. Returns int64 [sequences, tokens], prompts
    followed by the generated tokens. Raises HeadsinkError for models without a compiled decode step (`refusal`), and for beam
    search, assisted generation, `return_dict_in_generate`, `inputs_embeds`, right padding, and a model without an applied plan.
    """
    check_call("decode", generation_config, model_kwargs)
    cache = given_cache(model_kwargs)
    if reason := refusal(model, cache.plan if isinstance(cache, PlanCache) else None):
        raise HeadsinkError(f"decode: {reason}")
    prompt = Prompt.of(model, input_ids, cache, generation_config, model_kwargs)
    if prompt.positions.dim() > 2:
        raise HeadsinkError("decode: positions of this model have several axes; leave out custom_generate")
    streamer = generate_argument("streamer") if streamer is None else streamer
    with torch.no_grad():
        prefill = prompt.read(cache, generation_config.prefill_chunk_size)
        cache, logits = returned_cache(prefill), prefill.logits[:, -1].float()
        if not isinstance(cache, PlanCache):
            raise HeadsinkError("decode: it needs a plan; call it inside `with headsink.apply(model, plan):`")
        positions = prompt.positions[:, -1] + 1
        padding = cached_padding(cache)
        by_column = positions + (0 if padding is None else padding.tokens) == cache.get_seq_length()
        own_places = not bool(by_column.all())
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        filler = generation_config._pad_token_tensor
        fills = filler is not None and any(hasattr(c, "eos_token_id") for c in stopping_criteria)
        with open_decoder(model, cache) as step:
            while True:
                scores = logits_processor(input_ids, logits)
                if generation_config.do_sample:
                    token = torch.multinomial(scores.softmax(-1), 1)
                else:
                    token = scores.argmax(-1, keepdim=True)
                if fills:
                    token = torch.where(ended[:, None], filler.to(token.device), token)
                input_ids = torch.cat([input_ids, token], 1)
                if streamer is not None:
                    streamer.put(token[:, 0].cpu())
                ended = ended | stopping_criteria(input_ids, scores)
                if bool(ended.all()):
                    break
                logits, positions = step.run(token[:, 0], positions if own_places else None), positions + 1
    if streamer is not None:
        streamer.end()
    return input_ids

"""Decoding by a step of our own: one compiled call a token on a CPU (cpu/), a CUDA graph on a GPU (gpu/).

    model.generate(**inputs, custom_generate=headsink.decode)      # inside `with headsink.apply(model, plan):`

transformers prepares everything and hands over its own logits processors and stopping criteria; only the forward passes of
single tokens, one of every text, are ours. Prompts go through the model. What this cannot run (`refusal`) is refused with the
reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headsink.cache.cache import PlanCache
from headsink.errors import HeadsinkError
from headsink.generation.prompt import Prompt, check_call, padding_of
from headsink.models.transformers_names import generate_argument, given_cache, returned_cache
from headsink.utils import device


class Decoder(Protocol):
    """A model and a cache, laid out for single tokens. Others may change neither in between, but for `resume`."""

    def run(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Let a token of every text in, int64 [texts]. places: their positions, if they are not those of the columns.

        Returns the logits of what follows, float32 [texts, vocabulary].
        """

    def start_evicting(self) -> None:
        """Tell the cache what has come in."""

    def resume(self) -> None:
        """Go on after the cache was changed by others."""


def _backend(model: PreTrainedModel) -> Any:
    if model.device.type in device.DEVICES:
        from headsink.generation import step_cuda as on_gpu

        return on_gpu
    from headsink.generation import step_cpu as on_cpu

    return on_cpu


def refusal(model: PreTrainedModel) -> str | None:
    """Why a model cannot decode here; None if it can."""
    kind = model.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != model.dtype:
        return "it does not follow torch.autocast; convert the model with model.to(dtype) instead"
    found: str | None = _backend(model).refusal(model)
    return found


def prepare(model: PreTrainedModel) -> None:
    """Compile what a model that can decode here runs: half a minute the first time on a machine, then from a cache."""
    _backend(model).prepare(model)


def decoder(model: PreTrainedModel, cache: PlanCache) -> Decoder:
    """A step for a model and a cache that holds a text. Raises HeadsinkError with the reason if there is none (`refusal`)."""
    if reason := refusal(model):
        raise HeadsinkError(f"decode: {reason}")
    step: Decoder = _backend(model).Decoder(model, cache)
    return step


@contextmanager
def decoding(model: PreTrainedModel, cache: PlanCache) -> Iterator[Decoder]:
    """Decode one token after the other into a cache, which is in order again after the block."""
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

    The model reads the prompt with all arguments that `generate` was given, images too. transformers does not hand the tokenizer
    for stop strings to a loop that it is given: make a `StopStringCriteria` of them.

    input_ids: int64 [texts, tokens], padded on the left with `attention_mask`. Returns int64 [texts, tokens], the prompts and
    what follows them. Raises HeadsinkError for what it cannot run: see `refusal`; and beams, assisted generation,
    `return_dict_in_generate`, `inputs_embeds`, right padding, a model that no plan is applied to.
    """
    check_call("decode", generation_config, model_kwargs)
    if reason := refusal(model):
        raise HeadsinkError(f"decode: {reason}")
    cache = given_cache(model_kwargs)
    prompt = Prompt.of(model, input_ids, cache, generation_config, model_kwargs)
    if prompt.places.dim() > 2:
        raise HeadsinkError("decode: this model has positions of several axes; leave out custom_generate")
    streamer = generate_argument("streamer") if streamer is None else streamer
    with torch.no_grad():
        read = prompt.read(cache, generation_config.prefill_chunk_size)
        cache, logits = returned_cache(read), read.logits[:, -1].float()
        if not isinstance(cache, PlanCache):
            raise HeadsinkError("decode: it runs under a plan, inside `with headsink.apply(model, plan):`")
        place = prompt.places[:, -1] + 1
        padding = padding_of(cache)
        by_column = place + (0 if padding is None else padding.tokens) == cache.get_seq_length()
        own_places = not bool(by_column.all())
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        filler = generation_config._pad_token_tensor
        fills = filler is not None and any(hasattr(c, "eos_token_id") for c in stopping_criteria)
        with decoding(model, cache) as step:
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
                logits, place = step.run(token[:, 0], place if own_places else None), place + 1
    if streamer is not None:
        streamer.end()
    return input_ids

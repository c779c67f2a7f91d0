"""Lossless mode: `model.generate` by self-speculative decoding (speculative.py), or with the compiled step of a CPU by prompt
lookup decoding (lookup.py)."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from headsink.attention.formats import KVDtype
from headsink.decoding.step import prepare, refusal
from headsink.errors import HeadsinkError
from headsink.generation.acceptance import MOST
from headsink.generation.lookup import LookupDecoder
from headsink.generation.prompt import Prompt, check_call
from headsink.generation.sequences import Speculation
from headsink.generation.speculative import SpeculativeDecoder, draft_cache
from headsink.models.distributed import input_device
from headsink.models.spec import RECURRENT, describe
from headsink.models.transformers_names import given_cache
from headsink.plan.plan import Plan
from headsink.runtime.apply import apply_here, new_cache
from headsink.runtime.options import check_kv_dtype
from headsink.utils import device


def generate_lossless(
    model: PreTrainedModel,
    plan: Plan | None,
    input_ids: Tensor,
    *,
    draft_tokens: int | None = None,
    kv_dtype: KVDtype = "auto",
    speculation: Speculation | None = None,
    **options: Any,
) -> Tensor:
    """`model.generate(input_ids, **options)` by speculative decoding. Returns int64 [batch, tokens].

    On a GPU, or with `draft_tokens`, the plan's cache drafts. Greedy output equals that of the full cache up to ties within
    rounding, and memory is that of both caches. On a CPU where the model has a compiled decode step, drafts come from the text
    itself and `plan` may be None; greedy output is that of `model.generate` inside `apply(model, Plan.full(model),
    exact=False)`, token for token. Sampled output has the distribution of the full cache.

    input_ids: int64 [batch, tokens], padded on the left with `attention_mask`. draft_tokens: of the plan's cache, per round, 0 to
    8. If None, as many are drafted as measured acceptance and times say, or none where that is faster. kv_dtype: of the plan's
    cache, as for `new_cache`. speculation: filled with counts. options: of
    `model.generate`, greedy or sampling: max_new_tokens, do_sample, temperature, logits processors, stopping criteria, streamer
    (for one sequence), ... Raises HeadsinkError if the plan was made for another model, if there is none where it drafts, and for
    beam search, a cache of your own and return_dict_in_generate.
    """
    if draft_tokens is not None and not 0 <= draft_tokens <= MOST:
        raise HeadsinkError(f"draft_tokens: {draft_tokens} is outside 0 to {MOST}")
    check_kv_dtype(kv_dtype)
    if plan is not None and plan.positions == "cache-relative":
        raise HeadsinkError(
            "positions: cache-relative, unlike those of the full cache; use a plan with absolute positions"
        )
    if given_cache(options) is not None or options.get("custom_generate") is not None:
        raise HeadsinkError(
            "lossless: it makes its own caches and has its own decoding loop; leave out the cache and custom_generate"
        )
    if options.pop("use_cache", True) is False:
        raise HeadsinkError("lossless: it needs two caches; leave out use_cache=False")
    shape = describe(model) if plan is None else plan.check(model)
    shape.refuse("lossless", "chunked_attention", *RECURRENT)
    options = with_stop_strings(options)
    if plan is not None:
        plan = plan.model_copy(update={"quality": ()})  # no warning about the context: all tokens are verified
    loop = partial(
        _loop,
        plan=plan,
        fixed=draft_tokens,
        kv_dtype=kv_dtype,
        counts=Speculation() if speculation is None else speculation,
        streamer=options.get("streamer"),
    )
    return model.generate(input_ids, custom_generate=loop, use_cache=True, **options)  # type: ignore[operator, no-any-return]


def with_stop_strings(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate` with stop_strings as a stopping criterion, since transformers 5.19 does not pass their tokenizer to
    a custom decoding loop."""
    strings, tokenizer = options.get("stop_strings"), options.get("tokenizer")
    if strings is None:
        return options
    if tokenizer is None:
        raise HeadsinkError("stop_strings: they need tokenizer=")
    criteria = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, strings)])
    rest = {name: value for name, value in options.items() if name not in ("stop_strings", "tokenizer")}
    return {**rest, "stopping_criteria": criteria}


def _loop(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    plan: Plan | None,
    fixed: int | None,
    kv_dtype: KVDtype,
    counts: Speculation,
    streamer: Any = None,
    **given: Any,
) -> Tensor:
    """The decoding loop, called by `model.generate(custom_generate=...)`."""
    check_call(generation_config, given)
    if streamer is not None and len(input_ids) > 1:
        raise HeadsinkError("lossless: a streamer takes one sequence")
    prompt = Prompt.of(model, input_ids, generation_config, given)
    full_plan = Plan.full(model)
    batch = len(input_ids) if any(map(_by_number, logits_processor)) else None
    processed = partial(_process_logits, logits_processor, batch)
    state: LookupDecoder | SpeculativeDecoder
    with torch.no_grad(), apply_here(model, full_plan):
        full = new_cache(model, full_plan, exact=False)
        position, sample = prompt.positions[..., -1], generation_config.do_sample
        if fixed is None and _decodes_on_cpu(model, prompt):
            prepare(model)
            first = prompt.read(full)
            state = LookupDecoder(model, input_ids, position, full)
            state.run(processed, stopping_criteria, sample=sample, told=counts, streamer=streamer, first=first)
            counts.kv_bytes = full.nbytes()
        elif plan is None:
            raise HeadsinkError("lossless: the cache of a plan drafts here; give a plan")
        else:
            if input_ids.shape[1] > 1:
                prompt.read(full, left_out=1)
            draft = draft_cache(model, plan, full, kv_dtype)
            state = SpeculativeDecoder(model, input_ids, position, full, draft)
            state.run(processed, stopping_criteria, sample=sample, drafted=fixed, told=counts, streamer=streamer)
            counts.kv_bytes = full.nbytes() + draft.nbytes()
    if streamer is not None:
        streamer.end()
    padding = generation_config._pad_token_tensor
    filler = 0 if padding is None else int(padding.flatten()[0])
    return torch.nn.utils.rnn.pad_sequence(state.texts, batch_first=True, padding_value=filler)


def _decodes_on_cpu(model: PreTrainedModel, prompt: Prompt) -> bool:
    """Whether the compiled step on a CPU decodes, and drafts come from the text."""
    kind = input_device(model).type
    on_cpu = kind == "cpu" and kind not in device.DEVICES
    return on_cpu and prompt.positions.dim() == 2 and refusal(model, Plan.full(model)) is None


def _by_number(processor: Any) -> bool:
    """Whether a logits processor depends on the number of a sequence, such as a repetition penalty that skips padding."""
    return isinstance(getattr(processor, "prompt_ignore_length", None), Tensor) or hasattr(
        processor, "_prefix_allowed_tokens_fn"
    )


def _process_logits(processor: Any, batch: int | None, sequence: int, ids: Tensor, logits: Tensor) -> Tensor:
    """Apply the logits processors to the logits [vocabulary] after one sequence of a batch.

    batch: repeat the sequence this many times, so that a processor that depends on its number finds it; None to call once.
    """
    if batch is None:
        processed: Tensor = processor(ids[None], logits[None].clone())[0]
        return processed
    return cast(Tensor, processor(ids.expand(batch, -1), logits.repeat(batch, 1))[sequence])

"""Self-speculative decoding (Leviathan et al., arXiv 2211.17192): the model with a compressed cache drafts tokens, the model
with the full cache verifies several of them in one pass.

There are two caches, the full one and the plan's, so memory is higher than with the full cache alone. It saves time where
decoding is limited by reading the full cache (long contexts, large batches). On a CPU drafts also come from the text itself,
where its last tokens stood before (prompt lookup). Where neither pays, by measured times, the compiled step (decode.py) decodes
with the full cache. Keys and values of accepted tokens are copied from the full cache into the plan's, so the draft only uses
exact ones. The compiled step drafts if it supports the model. Rows of a batch may accept different numbers of tokens: rejected
tokens stay in a row's cache but are hidden, and its positions continue without a gap.

Greedy output equals that of the full cache; sampled output has the same distribution. A drafted token x is accepted with
probability min(1, p(x) / q(x)), otherwise a token is drawn from max(0, p - q); p and q are taken after the logits processors.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from headsink.cache.cache import PlanCache
from headsink.cache.layer import PlanLayer
from headsink.errors import HeadsinkError
from headsink.generation.acceptance import MOST, DraftLength, Lookup, accept_greedy, accept_sampled
from headsink.generation.decode import Decoder, decoder, prepare, refusal
from headsink.generation.prompt import Prompt, check_call
from headsink.models.spec import RECURRENT, describe
from headsink.models.transformers_names import cache_argument, given_cache
from headsink.plan.plan import Plan
from headsink.runtime.apply import apply_here, new_cache
from headsink.utils import device


@dataclass
class Speculation:
    """Counts of a lossless generation. drafted, accepted: tokens over all rows. passes: forward passes with the full cache,
    without the prefill. kv_bytes: of both caches at the end. lengths: drafted tokens per row in each pass."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    kv_bytes: int = 0
    lengths: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None


def generate_lossless(
    model: PreTrainedModel,
    plan: Plan,
    input_ids: Tensor,
    *,
    draft_tokens: int | None = None,
    speculation: Speculation | None = None,
    **options: Any,
) -> Tensor:
    """`model.generate(input_ids, **options)` by self-speculative decoding with `plan` as draft. Returns int64 [batch, tokens].

    Greedy output equals that of the full cache (up to ties within rounding); sampled output has its distribution. Memory is that
    of the full KV cache and the plan's.

    input_ids: int64 [batch, tokens], padded on the left with `attention_mask`. draft_tokens: of the compressed cache, per round,
    0 to 8. If None, they and tokens from the text itself are drafted as measured acceptance and times say, or none where
    decoding with the full cache is faster. speculation: filled with counts. options: of `model.generate`, greedy or sampling:
    max_new_tokens, do_sample, temperature, logits processors, stopping criteria, streamer (for one sequence), ... Raises
    HeadsinkError if the plan was made for another model, and for beam search, a cache of your own and return_dict_in_generate.
    """
    if draft_tokens is not None and not 0 <= draft_tokens <= MOST:
        raise HeadsinkError(f"draft_tokens: {draft_tokens} is outside 0 to {MOST}")
    if plan.positions == "cache-relative":
        raise HeadsinkError(
            "positions: cache-relative, unlike those of the full cache; use a plan with absolute positions"
        )
    if given_cache(options) is not None or options.get("custom_generate") is not None:
        raise HeadsinkError(
            "lossless: it makes its own caches and has its own decoding loop; leave out the cache and custom_generate"
        )
    if options.pop("use_cache", True) is False:
        raise HeadsinkError("lossless: it needs two caches; leave out use_cache=False")
    plan.check(model).refuse("lossless", "chunked_attention", *RECURRENT)
    options = with_stop_strings(options)
    plan = plan.model_copy(update={"quality": ()})  # no warning about the context: all tokens are verified
    loop = partial(
        _loop,
        plan=plan,
        fixed=draft_tokens,
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
    plan: Plan,
    fixed: int | None,
    counts: Speculation,
    streamer: Any = None,
    **given: Any,
) -> Tensor:
    """The decoding loop, called by `model.generate(custom_generate=...)`."""
    check_call("lossless", generation_config, given)
    if streamer is not None and len(input_ids) > 1:
        raise HeadsinkError("lossless: a streamer takes one sequence")
    prompt = Prompt.of(model, input_ids, None, generation_config, given)
    full_plan = Plan.full(model)
    with torch.no_grad(), apply_here(model, full_plan):
        full = new_cache(model, full_plan, exact=False)
        if input_ids.shape[1] > 1:
            prompt.read(full, leave=1)
        draft = draft_cache(model, plan, full)
        state = SpeculativeDecoder(model, input_ids, prompt.positions[..., -1], full, draft)
        state.run(
            partial(
                _process_logits, logits_processor, len(input_ids) if any(map(_by_number, logits_processor)) else None
            ),
            stopping_criteria,
            sample=generation_config.do_sample,
            drafted=fixed,
            told=counts,
            streamer=streamer,
        )
    counts.kv_bytes = full.nbytes() + draft.nbytes()
    if streamer is not None:
        streamer.end()
    padding = generation_config._pad_token_tensor
    filler = 0 if padding is None else int(padding.flatten()[0])
    return torch.nn.utils.rnn.pad_sequence(state.texts, batch_first=True, padding_value=filler)


class SpeculativeDecoder:
    """State of a batch. texts: each sequence so far, int64 [tokens]. position: of the last token of every unfinished
    sequence, int64 [rows], or [axes, rows] where positions have several axes; neither cache has that token yet. full: the full
    cache, with all tokens before it. draft: the plan's, which may lack the last `lag` of these."""

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, position: Tensor, full: PlanCache, draft: PlanCache):
        self.model, self.texts, self.position, self.full, self.draft = model, list(input_ids), position, full, draft
        self.rows = list(range(len(input_ids)))  # unfinished sequences
        self.step: Decoder | None = None  # drafts, if it supports the model
        self.judge: Any = None  # verifies, on a GPU
        self.single: Decoder | None = None  # decodes with the full cache, on a CPU
        self.lag = 0
        # A compiled step cannot take tokens back from a window. Hidden columns would count in it: there all rows accept as many
        # tokens as the row with the fewest.
        windows = any(window is not None for window in describe(model).windows)
        self.ragged = not windows
        self.compiled = position.dim() == 1 and not windows and refusal(model, draft.plan) is None
        if self.compiled:
            prepare(model)  # not part of the measured times
        on_cpu = self.compiled and input_ids.device.type not in device.DEVICES
        self.lookups = [Lookup(text.tolist()) for text in self.texts] if on_cpu else []

    def run(
        self,
        processed: Callable[[int, Tensor, Tensor], Tensor],
        stop: Any,
        *,
        sample: bool,
        drafted: int | None,
        told: Speculation,
        streamer: Any = None,
    ) -> None:
        """Decode until all sequences end.

        processed: logits processors, called with the number of a sequence, its tokens and its logits [vocabulary]. stop:
        transformers' stopping criteria. drafted: tokens per round, None to choose them from measured times. told: is filled with
        counts.
        """
        pick, pace, fixed = accept_sampled if sample else accept_greedy, DraftLength(), drafted
        while self.rows:
            guesses = self._look_up()
            source, drafted = pace.choose(len(guesses)) if fixed is None else (pace.cache, fixed)
            if not drafted and self.lookups and self.full.get_seq_length():
                self._decode(pace, fixed, processed, pick, stop, told, streamer)
                continue
            start = time.perf_counter()
            if source is pace.lookup:
                given = torch.stack([self.texts[text][-1] for text in self.rows])
                tokens, proposals = torch.stack([given, *guesses[:drafted]], 1), list[list[Tensor]]()
            else:
                tokens, proposals = self._draft(drafted, processed, pick)
            middle = time.perf_counter()
            positions = self.position[..., None] + torch.arange(drafted + 1, device=self.position.device)
            logits = self._verify(tokens, positions)
            picks = []
            for row, text in enumerate(self.rows):
                own = tokens[row, 1:]
                probabilities = [
                    processed(text, torch.cat([self.texts[text], own[:n]]), logits[row, n]) for n in range(drafted + 1)
                ]
                picks.append(pick(probabilities, own.tolist(), [one[row] for one in proposals]))
            least = min(len(accepted) for accepted, _ in picks)
            mean = sum(len(accepted) for accepted, _ in picks) / len(picks)
            pace.update(source, drafted, middle - start, time.perf_counter() - middle, mean)
            told.passes, told.drafted = told.passes + 1, told.drafted + drafted * len(picks)
            told.lengths.append(drafted)
            unfinished = []
            for row, (accepted, last) in enumerate(picks):
                if not self.ragged and len(accepted) > least:
                    accepted, last = accepted[:least], accepted[least]
                told.accepted += len(accepted)
                unfinished.append(self._append(row, [*accepted, last], stop, streamer))
            kept = [len(accepted) if self.ragged else least for accepted, _ in picks]
            self._update_caches(drafted, source is pace.cache, kept, unfinished)

    def _look_up(self) -> list[Tensor]:
        """Return the tokens that followed the last ones before, int64 [rows] each; none if a row has none."""
        if not self.lookups:
            return []
        found = [self.lookups[text].find() for text in self.rows]
        least = min(map(len, found))
        return list(torch.tensor([one[:least] for one in found], device=self.position.device).T)

    def _decode(
        self,
        pace: DraftLength,
        fixed: int | None,
        processed: Callable[..., Tensor],
        pick: Callable[..., Any],
        stop: Any,
        told: Speculation,
        streamer: Any,
    ) -> None:
        """Decode with the full cache, token by token, until a sequence ends or drafts are expected to be faster.

        The tokens say without cost whether lookups would have been accepted.
        """
        if self.single is None:
            self.single = decoder(self.model, self.full)
        else:
            self.single.resume()
        unfinished = [True] * len(self.rows)
        while True:
            start, guesses = time.perf_counter(), self._look_up()
            logits = self.single.run(torch.stack([self.texts[text][-1] for text in self.rows]), self.position)
            for row, text in enumerate(self.rows):
                _, token = pick([processed(text, self.texts[text], logits[row])], [], [])
                if guesses:
                    pace.lookup.judge(float(token == int(guesses[0][row])))
                unfinished[row] = self._append(row, [token], stop, streamer)
            self.position, self.lag = self.position + 1, self.lag + 1
            pace.update(pace.cache, 0, 0.0, time.perf_counter() - start, 0.0)
            told.passes += 1
            told.lengths.append(0)
            if not all(unfinished) or (fixed is None and pace.choose(len(self._look_up()))[1]):
                break
        self.single.start_evicting()
        self._drop(unfinished)

    def _draft(
        self, count: int, processed: Callable[..., Tensor], pick: Callable[..., Any]
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """Draft `count` tokens: int64 [rows, 1 + count], with each sequence's last token first, and their processed logits."""
        tokens = torch.stack([self.texts[text][-1:] for text in self.rows])
        proposals = []
        self._catch_up()
        if self.compiled and self.step is None and self.draft.get_seq_length():
            self.step = decoder(self.model, self.draft)
        elif self.step is not None:
            self.step.resume()
        for n in range(count):
            if self.step is not None:
                logits = self.step.run(tokens[:, -1], self.position + n)
            else:
                logits = _forward(self.model, self.draft, tokens[:, -1:], self.position[..., None] + n).float()[:, -1]
            own = [
                processed(text, torch.cat([self.texts[text], tokens[row, 1:]]), logits[row])
                for row, text in enumerate(self.rows)
            ]
            picks = [pick([one], [], [])[1] for one in own]
            tokens = torch.cat([tokens, tokens.new_tensor(picks)[:, None]], 1)
            proposals.append(own)
        if self.step is not None:
            self.step.start_evicting()
        return tokens, proposals

    def _verify(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits of the full cache after each token, [rows, tokens, vocabulary]; on a GPU by the CUDA graph where supported."""
        if self.judge is None and self.compiled and self.full.get_seq_length() and tokens.device.type in device.DEVICES:
            self.judge = decoder(self.model, self.full)
        if self.judge is None:
            return _forward(self.model, self.full, tokens, positions).float()
        self.judge.resume()
        logits: Tensor = self.judge.read(tokens, positions)
        self.judge.start_evicting()
        return logits

    def _append(self, row: int, new: list[int], stop: Any, streamer: Any) -> bool:
        """Append tokens to a sequence, up to the one that ends it. Returns whether it is unfinished."""
        text = self.rows[row]
        for token in new:
            self.texts[text] = torch.cat([self.texts[text], self.texts[text].new_tensor([token])])
            if self.lookups:
                self.lookups[text].append(token)
            if streamer is not None:
                streamer.put(self.texts[text][-1:])
            if bool(stop(self.texts[text][None], None).all()):
                return False
        return True

    def _update_caches(self, drafted: int, by_draft: bool, accepted: list[int], unfinished: list[bool]) -> None:
        """Leave in both caches the accepted tokens, with keys and values of the full cache, and only unfinished rows.

        by_draft: whether the draft's cache has the drafted tokens.
        """
        counts = torch.tensor(accepted, device=self.position.device)
        columns = int(counts.max()) + 1
        if by_draft:
            _crop(self.draft, drafted)
        recent = [_recent(layer, columns) for layer in _layers(self.full)]
        _crop(self.full, drafted + 1 - columns)
        hidden = torch.arange(columns, device=counts.device) > counts[:, None]
        if self.lookups:
            self._append_later(columns, hidden)
        else:
            self._copy_to_draft(columns, hidden, recent)
        self.position = self.position + counts + 1
        self._drop(unfinished)

    def _drop(self, unfinished: list[bool]) -> None:
        """Keep only unfinished rows."""
        remaining = [row for row, goes_on in enumerate(unfinished) if goes_on]
        self.rows = [self.rows[row] for row in remaining]
        if remaining and not all(unfinished):
            rows = torch.tensor(remaining, device=self.position.device)
            self.position = self.position[..., rows]
            for cache in (self.full, self.draft):
                cache.batch_select_indices(rows)

    def _append_later(self, columns: int, hidden: Tensor) -> None:
        """Leave the last columns of the full cache for `_catch_up`, unless some are hidden, bool [rows, columns]."""
        self.lag += columns
        if bool(hidden.any()):
            self._catch_up()
            for cache in (self.full, self.draft):
                cache.hide(hidden)

    def _catch_up(self) -> None:
        """Append to the draft the columns that it lacks."""
        for mine, theirs in zip(_layers(self.draft), _layers(self.full), strict=True):
            if self.lag:
                mine.append(*theirs.groups[0].last(self.lag))
        self.lag = 0

    def _copy_to_draft(self, columns: int, hidden: Tensor, recent: list[tuple[Tensor, Tensor] | None]) -> None:
        """Append the last columns of the full cache to the draft's.

        hidden: bool [rows, columns], rejected tokens of a row. recent: keys and values of these columns in layers with a window.
        """
        some = bool(hidden.any())
        if self.judge is not None and self.step is not None:
            both = self.judge, cast(Any, self.step)
            for one in both:
                one.resume()
            both[1].take(self.full, columns)
            for one in both if some else ():
                one.hide(hidden)
            both[1].start_evicting()
            return
        for mine, theirs, own in zip(_layers(self.draft), _layers(self.full), recent, strict=True):
            mine.append(*(theirs.groups[0].last(columns) if own is None else own))
        for cache in (self.full, self.draft) if some else ():
            cache.hide(hidden)


def _forward(model: PreTrainedModel, cache: PlanCache, ids: Tensor, positions: Tensor, **options: Any) -> Tensor:
    """Append tokens at `positions` to a cache. Returns their logits, [rows, tokens, vocabulary]."""
    logits: Tensor = model(ids, position_ids=positions, **cache_argument(cache), use_cache=True, **options).logits
    return logits


def draft_cache(model: PreTrainedModel, plan: Plan, full: PlanCache) -> PlanCache:
    """A frozen cache with the keys of the full cache that the plan keeps. Tokens of both caches can be cropped afterwards."""
    draft = new_cache(model, plan)
    for index, (mine, theirs) in enumerate(zip(draft.layers, full.layers, strict=True)):
        if not isinstance(mine, PlanLayer) or not isinstance(theirs, PlanLayer):
            continue  # has no keys of its own
        if mine.sliding is not None:
            draft.layers[index] = copy.deepcopy(theirs)
        elif theirs.groups:
            group = theirs.groups[0]
            group.holes = True  # rows will have hidden tokens; also makes short passes use the kernels
            mine.fill(*group.last(theirs.seen), group.padding)
    draft.freeze()
    for cache in (full, draft):
        cache.activate_past_recording()
    return draft


def _layers(cache: PlanCache) -> list[PlanLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PlanLayer)]  # others have no keys of their own


def _crop(cache: PlanCache, tokens: int) -> None:
    """Remove the last tokens, and append the others of a pass to the windows, also if there are none to remove."""
    for layer in cache.layers:
        layer.crop(-tokens)


def _recent(layer: PlanLayer, columns: int) -> tuple[Tensor, Tensor] | None:
    """Return keys and values of the first columns of the last pass, if they are not appended to the layer yet."""
    recent = layer.groups[0].recent
    return None if recent is None else (recent[0][:, :, :columns], recent[1][:, :, :columns])


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

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
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headsink.cache.cache import KVDtype, PlanCache
from headsink.cache.layer import PlanLayer
from headsink.decoding.step import Decoder, decoder, prepare, refusal
from headsink.generation.acceptance import DraftLength, Lookup, accept_greedy, accept_sampled
from headsink.models.spec import describe
from headsink.models.transformers_names import cache_argument
from headsink.plan.plan import Plan
from headsink.runtime.apply import new_cache
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
            prepare(model, draft.kv_dtype)  # not part of the measured times
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


def draft_cache(model: PreTrainedModel, plan: Plan, full: PlanCache, kv_dtype: KVDtype = "auto") -> PlanCache:
    """A frozen cache with the keys of the full cache that the plan keeps. Tokens of both caches can be cropped afterwards."""
    draft = new_cache(model, plan, kv_dtype=kv_dtype)
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

"""Self-speculative decoding (Leviathan et al., arXiv 2211.17192): the model with a compressed cache drafts tokens, the model
with the full cache verifies several of them in one pass.

There are two caches, the full one and the plan's, so memory is higher than with the full cache alone. It saves time where
decoding is limited by reading the full cache (long contexts, large batches). Keys and values of accepted tokens are copied from
the full cache into the plan's, so the draft only uses exact ones. The compiled step drafts and verifies if it supports the model.
Rows of a batch may accept different numbers of tokens: rejected tokens stay in a row's cache but are hidden, and its positions
continue without a gap.

Greedy output equals that of the full cache; sampled output has the same distribution. A drafted token x is accepted with
probability min(1, p(x) / q(x)), otherwise a token is drawn from max(0, p - q); p and q are taken after the logits processors.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.formats import KVDtype
from headsink.cache.cache import PlanCache
from headsink.cache.layer import PlanLayer
from headsink.decoding.step import Decoder, decoder, prepare, refusal
from headsink.generation.acceptance import DraftLength, accept_greedy, accept_sampled
from headsink.generation.sequences import Sequences, Speculation
from headsink.models.spec import describe
from headsink.models.transformers_names import cache_argument
from headsink.plan.plan import Plan
from headsink.runtime.apply import new_cache
from headsink.utils import device


class SpeculativeDecoder(Sequences):
    """State of a batch. draft: the plan's cache, with the tokens of the full one; neither has the last token yet."""

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, position: Tensor, full: PlanCache, draft: PlanCache):
        super().__init__(input_ids, position, full)
        self.model, self.draft = model, draft
        self.step: Decoder | None = None  # drafts, if it supports the model
        self.judge: Any = None  # verifies, if it supports the model
        # Hidden columns would count in a window: there all rows accept as many tokens as the row with the fewest. A cache that
        # records tokens for it has no compiled step.
        windows = any(window is not None for window in describe(model).windows)
        self.ragged = not windows
        self.compiled = position.dim() == 1 and not windows and refusal(model, draft.plan) is None
        self.on_card = input_ids.device.type in device.DEVICES
        if self.compiled:
            for kv_dtype in ("auto", draft.kv_dtype):
                prepare(model, kv_dtype)  # not part of the measured times

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
            drafted = pace.choose() if fixed is None else fixed
            start = time.perf_counter()
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
            pace.update(drafted, middle - start, time.perf_counter() - middle, mean)
            told.passes, told.drafted = told.passes + 1, told.drafted + drafted * len(picks)
            told.lengths.append(drafted)
            unfinished = []
            for row, (accepted, last) in enumerate(picks):
                if not self.ragged and len(accepted) > least:
                    accepted, last = accepted[:least], accepted[least]
                told.accepted += len(accepted)
                unfinished.append(self.append(row, [*accepted, last], stop, streamer))
            kept = [len(accepted) if self.ragged else least for accepted, _ in picks]
            self._update_caches(drafted, kept, unfinished)

    def _draft(
        self, count: int, processed: Callable[..., Tensor], pick: Callable[..., Any]
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """Draft `count` tokens: int64 [rows, 1 + count], with each sequence's last token first, and their processed logits."""
        tokens = torch.stack([self.texts[text][-1:] for text in self.rows])
        proposals = []
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
        """Logits of the full cache after each token, [rows, tokens, vocabulary], by the compiled step where supported."""
        if self.judge is None and self.compiled and self.full.get_seq_length():
            self.judge = decoder(self.model, self.full)
        if self.judge is None:
            return _forward(self.model, self.full, tokens, positions).float()
        self.judge.resume()
        logits: Tensor = self.judge.read(tokens, positions)
        self.judge.start_evicting()
        return logits

    def _update_caches(self, drafted: int, accepted: list[int], unfinished: list[bool]) -> None:
        """Leave in both caches the accepted tokens, with keys and values of the full cache, and only unfinished rows."""
        counts = torch.tensor(accepted, device=self.position.device)
        columns = int(counts.max()) + 1
        _crop(self.draft, drafted)
        recent = [_recent(layer, columns) for layer in _layers(self.full)]
        _crop(self.full, drafted + 1 - columns)
        hidden = torch.arange(columns, device=counts.device) > counts[:, None]
        self._copy_to_draft(columns, hidden, recent)
        self.position = self.position + counts + 1
        self.drop(unfinished, self.full, self.draft)

    def _copy_to_draft(self, columns: int, hidden: Tensor, recent: list[tuple[Tensor, Tensor] | None]) -> None:
        """Append the last columns of the full cache to the draft's.

        hidden: bool [rows, columns], rejected tokens of a row. recent: keys and values of these columns in layers with a window.
        """
        some = bool(hidden.any())
        if self.on_card and self.judge is not None and self.step is not None:
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

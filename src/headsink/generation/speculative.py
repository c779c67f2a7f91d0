"""SpeculativeDecoder mode: the plan drafts, the model itself verifies several tokens in one pass.

Speculative decoding (Leviathan et al., arXiv 2211.17192) in which the draft is the same model under a plan. Two caches are kept:
the full one, and what the plan keeps of it, so memory is more than that of the model itself; what is saved is time, where
reading the full cache is what takes it (long contexts, many texts at once). Keys and values of tokens that were accepted are
copied from the full cache into the plan's, so the draft looks at exact ones only. Where the compiled step (decode.py) can run the
model, it drafts; passes of the model decide. Rows of a batch accept different numbers of tokens; what a row did not accept stays
in its cache unseen, and its positions go on without a gap.

Greedy text is the model's own; sampled text has its distribution: a drafted token x is accepted with probability
min(1, p(x) / q(x)), else drawn from max(0, p - q), p and q as the logits processors leave them.
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
from headsink.generation.decode import Decoder, decoder, prepare, refusal
from headsink.generation.prompt import Prompt, check_call
from headsink.models.transformers_names import cache_argument, given_cache
from headsink.plan.plan import Plan
from headsink.runtime.apply import apply_here, new_cache
from headsink.utils import device

MOST = 8  # tokens drafted at once
MEMORY = 0.9  # weight of what was seen before, in the running means of acceptance and time
AGAIN = 32  # rounds without a draft after which one token is drafted, to see whether it pays by now


@dataclass
class Speculation:
    """What a lossless generation did. drafted, accepted: tokens, over all rows; passes: of the full model, its prompt's left out;
    kv_bytes: of both caches at the end."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    kv_bytes: int = 0
    lengths: list[int] = field(default_factory=list)  # of the draft in each round

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None


class DraftLength:
    """How many tokens to draft: as many as promise most tokens for the time, by the acceptance and the times seen."""

    def __init__(self) -> None:
        self.acceptance, self.draft, self.idle = 0.8, 0.0, 0
        self.verify: dict[int, float] = {}  # tokens: seconds

    def choose(self) -> int:
        if not self.verify:
            return 0  # what a pass of one token takes
        if len(self.verify) == 1:
            return 3
        if self.idle >= AGAIN:
            return 1
        return max(range(MOST + 1), key=lambda drafted: self._expected(drafted) / self._seconds(drafted))

    def _expected(self, drafted: int) -> float:
        return sum(self.acceptance**n for n in range(drafted + 1))

    def _seconds(self, drafted: int) -> float:
        """Of a round: drafting, and verifying by a straight line through the fewest and the most tokens seen."""
        few, many = min(self.verify), max(self.verify)
        slope = max(0.0, (self.verify[many] - self.verify[few]) / (many - few))
        return drafted * self.draft + max(1e-9, self.verify[few] + slope * (drafted + 1 - few))

    def saw(self, drafted: int, draft: float, verify: float, accepted: float) -> None:
        """A round. draft, verify: seconds; accepted: tokens, mean over rows."""
        self.verify[drafted + 1] = _mean(self.verify.get(drafted + 1), verify)
        self.idle = 0 if drafted else self.idle + 1
        if drafted:
            self.draft = _mean(self.draft or None, draft / drafted)
            tried = min(accepted + 1, drafted)  # the first that is not accepted ends the trial
            self.acceptance = min(0.999, _mean(self.acceptance, accepted / tried))


def _mean(before: float | None, now: float) -> float:
    return now if before is None else MEMORY * before + (1 - MEMORY) * now


def generate_lossless(
    model: PreTrainedModel,
    plan: Plan,
    input_ids: Tensor,
    *,
    draft_tokens: int | None = None,
    speculation: Speculation | None = None,
    **options: Any,
) -> Tensor:
    """What `model.generate(input_ids, **options)` gives, drafted under `plan`: int64 [batch, tokens].

    Greedy text is the model's own (up to ties within rounding), sampled text has its distribution. The full KV cache is kept, and
    the plan's beside it.

    input_ids: int64 [batch, tokens], padded on the left with `attention_mask`. draft_tokens: of each round; as many as pay, by
    the acceptance and times seen, if not given. speculation: is told what was done. options: those of `model.generate`, greedy
    or sampling: max_new_tokens, do_sample, temperature, logits processors, stopping criteria, streamer (of one text), ...
    Raises HeadsinkError if the plan was made for another model, and for beams, a cache of one's own and return_dict_in_generate.
    """
    if draft_tokens is not None and not 0 <= draft_tokens <= MOST:
        raise HeadsinkError(f"draft_tokens: {draft_tokens} is outside 0 to {MOST}")
    if plan.positions == "cache-relative":
        raise HeadsinkError(
            "positions: counted in the cache, which is not what the full model does; use a plan with 'text'"
        )
    if given_cache(options) is not None or options.get("custom_generate") is not None:
        raise HeadsinkError("lossless: it has caches and a loop of its own; leave out the cache and custom_generate")
    if options.pop("use_cache", True) is False:
        raise HeadsinkError("lossless: it keeps two caches; leave out use_cache=False")
    plan.check(model)
    options = with_stop_strings(options)
    plan = plan.model_copy(update={"quality": ()})  # no length is beyond what is verified: all of it is
    loop = partial(
        _loop,
        plan=plan,
        fixed=draft_tokens,
        told=Speculation() if speculation is None else speculation,
        streamer=options.get("streamer"),
    )
    return model.generate(input_ids, custom_generate=loop, use_cache=True, **options)  # type: ignore[operator, no-any-return]


def with_stop_strings(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate` with stop_strings as a stopping criterion: transformers 5.19 does not hand the tokenizer that they
    need to a decoding loop that it is given."""
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
    told: Speculation,
    streamer: Any = None,
    **given: Any,
) -> Tensor:
    """The decoding loop that transformers is given."""
    check_call("lossless", generation_config, given)
    if streamer is not None and len(input_ids) > 1:
        raise HeadsinkError("lossless: a streamer takes one text")
    prompt = Prompt.of(model, input_ids, None, generation_config, given)
    everything = Plan.full(model)
    with torch.no_grad(), apply_here(model, everything):
        full = new_cache(model, everything, exact=False)
        if input_ids.shape[1] > 1:
            prompt.read(full, leave=1)
        draft = kept(model, plan, full)
        state = SpeculativeDecoder(model, input_ids, prompt.places[..., -1], full, draft)
        state.run(
            partial(_processed, logits_processor, len(input_ids) if any(map(_by_number, logits_processor)) else None),
            stopping_criteria,
            sample=generation_config.do_sample,
            drafted=fixed,
            told=told,
            streamer=streamer,
        )
    told.kv_bytes = full.nbytes() + draft.nbytes()
    if streamer is not None:
        streamer.end()
    padding = generation_config._pad_token_tensor
    filler = 0 if padding is None else int(padding.flatten()[0])
    return torch.nn.utils.rnn.pad_sequence(state.texts, batch_first=True, padding_value=filler)


class SpeculativeDecoder:
    """Texts on their way. texts: int64 [tokens] each; place: int64 [rows], of the last token of those that go on, which neither
    cache has seen yet; [axes, rows] where positions have several axes. full, draft: what the model and the plan hold of all
    before it (`kept`)."""

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, place: Tensor, full: PlanCache, draft: PlanCache):
        self.model, self.texts, self.place, self.full, self.draft = model, list(input_ids), place, full, draft
        self.rows = list(range(len(input_ids)))  # those that go on
        self.step: Decoder | None = None  # drafts, where it can run the model: what it says binds nobody
        self.judge: Any = None  # verifies, on a GPU
        self.compiled = place.dim() == 1 and refusal(model) is None
        if self.compiled:
            prepare(model)  # before the pace is set
        # A layer that slides by itself has no unseen columns: there all rows go as far as the slowest.
        self.ragged = all(isinstance(layer, PlanLayer) for layer in full.layers)

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
        """Go on until all texts end.

        processed: of a text by its number, its tokens and [vocabulary] logits, the logits to choose by; stop: transformers'
        stopping criteria; drafted: tokens of every round, None for as many as pay.
        """
        pick, pace, fixed = _sampled if sample else _greedy, DraftLength(), drafted
        while self.rows:
            drafted = pace.choose() if fixed is None else fixed
            start = time.perf_counter()
            tokens, proposals = self._draft(drafted, processed, pick)
            middle = time.perf_counter()
            places = self.place[..., None] + torch.arange(drafted + 1, device=self.place.device)
            logits = self._verify(tokens, places)
            found = []
            for row, text in enumerate(self.rows):
                guesses = tokens[row, 1:]
                probabilities = [
                    processed(text, torch.cat([self.texts[text], guesses[:n]]), logits[row, n])
                    for n in range(drafted + 1)
                ]
                found.append(pick(probabilities, guesses.tolist(), [one[row] for one in proposals]))
            least = min(len(accepted) for accepted, _ in found)
            pace.saw(drafted, middle - start, time.perf_counter() - middle, sum(len(a) for a, _ in found) / len(found))
            told.passes, told.drafted = told.passes + 1, told.drafted + drafted * len(found)
            told.lengths.append(drafted)
            going = []
            for row, (accepted, last) in enumerate(found):
                if not self.ragged and len(accepted) > least:
                    accepted, last = accepted[:least], accepted[least]
                told.accepted += len(accepted)
                going.append(self._enter(row, [*accepted, last], stop, streamer))
            self._start_evicting(drafted, [len(accepted) if self.ragged else least for accepted, _ in found], going)

    def _draft(
        self, count: int, processed: Callable[..., Tensor], pick: Callable[..., Any]
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """Tokens, int64 [rows, 1 + count], the last one of each text first, and the distributions that they were drawn from."""
        tokens = torch.stack([self.texts[text][-1:] for text in self.rows])
        proposals = []
        if self.compiled and self.step is None and self.draft.get_seq_length():
            self.step = decoder(self.model, self.draft)
        elif self.step is not None:
            self.step.resume()
        for n in range(count):
            if self.step is not None:
                logits = self.step.run(tokens[:, -1], self.place + n)
            else:
                logits = _forward(self.model, self.draft, tokens[:, -1:], self.place[..., None] + n).float()[:, -1]
            own = [
                processed(text, torch.cat([self.texts[text], tokens[row, 1:]]), logits[row])
                for row, text in enumerate(self.rows)
            ]
            drawn = [pick([one], [], [])[1] for one in own]
            tokens = torch.cat([tokens, tokens.new_tensor(drawn)[:, None]], 1)
            proposals.append(own)
        if self.step is not None:
            self.step.start_evicting()
        return tokens, proposals

    def _verify(self, tokens: Tensor, places: Tensor) -> Tensor:
        """The model's own logits after each of some tokens, [rows, tokens, vocabulary]: by its pass, on a GPU held by a graph."""
        if self.judge is None and self.compiled and self.full.get_seq_length() and tokens.device.type in device.DEVICES:
            self.judge = decoder(self.model, self.full)
        if self.judge is None:
            return _forward(self.model, self.full, tokens, places).float()
        self.judge.resume()
        logits: Tensor = self.judge.read(tokens, places)
        self.judge.start_evicting()
        return logits

    def _enter(self, row: int, new: list[int], stop: Any, streamer: Any) -> bool:
        """Add tokens to a text, up to the one that ends it. Returns whether the text goes on."""
        text = self.rows[row]
        for token in new:
            self.texts[text] = torch.cat([self.texts[text], self.texts[text].new_tensor([token])])
            if streamer is not None:
                streamer.put(self.texts[text][-1:])
            if bool(stop(self.texts[text][None], None).all()):
                return False
        return True

    def _start_evicting(self, drafted: int, accepted: list[int], kept: list[bool]) -> None:
        """Both caches hold what was accepted, with the full one's keys and values, of the rows that go on."""
        counts = torch.tensor(accepted, device=self.place.device)
        columns = int(counts.max()) + 1
        _crop(self.draft, drafted)
        _crop(self.full, drafted + 1 - columns)
        hidden = torch.arange(columns, device=counts.device) > counts[:, None]
        self._follow(columns, hidden)
        self.place = self.place + counts + 1
        going = [row for row, goes_on in enumerate(kept) if goes_on]
        self.rows = [self.rows[row] for row in going]
        if going and not all(kept):
            rows = torch.tensor(going, device=self.place.device)
            self.place = self.place[..., rows]
            for cache in (self.full, self.draft):
                cache.batch_select_indices(rows)

    def _follow(self, columns: int, hidden: Tensor) -> None:
        """Let the last columns of the full cache into the draft's. hidden: bool [rows, columns], not for a row to see."""
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
        for mine, theirs in zip(self.draft.layers, self.full.layers, strict=True):
            if isinstance(mine, PlanLayer) and isinstance(theirs, PlanLayer):
                mine.append(*theirs.groups[0].last(columns))
            else:
                mine.update(theirs.keys[:, :, -columns:], theirs.values[:, :, -columns:])  # type: ignore[index]
        for cache in (self.full, self.draft) if some else ():
            cache.hide(hidden)


def _forward(model: PreTrainedModel, cache: PlanCache, ids: Tensor, places: Tensor, **options: Any) -> Tensor:
    """Logits, [rows, tokens, vocabulary], of tokens at `places` of their texts."""
    found: Tensor = model(ids, position_ids=places, **cache_argument(cache), use_cache=True, **options).logits
    return found


def kept(model: PreTrainedModel, plan: Plan, full: PlanCache) -> PlanCache:
    """What the plan keeps of what the model has read; nothing of it is let go any more, and tokens can be taken back."""
    draft = new_cache(model, plan)
    for index, (mine, theirs) in enumerate(zip(draft.layers, full.layers, strict=True)):
        if not isinstance(mine, PlanLayer):
            draft.layers[index] = copy.deepcopy(theirs)
        elif isinstance(theirs, PlanLayer) and theirs.groups:
            group = theirs.groups[0]
            group.holes = True  # sooner or later; and a few tokens go through the kernels then
            mine.fill(*group.last(theirs.seen), group.padding)
    draft.freeze()
    for cache in (full, draft):
        cache.activate_past_recording()
    return draft


def _crop(cache: PlanCache, tokens: int) -> None:
    """Take back the last tokens. In a layer that slides and has begun to let go this ends the record, even if there are none."""
    for layer in cache.layers:
        if tokens or (not isinstance(layer, PlanLayer) and layer.get_seq_length() >= layer.sliding_window):
            layer.crop(-tokens)


def _by_number(processor: Any) -> bool:
    """Whether a logits processor treats a text by its number in the batch: a repetition penalty skips the padding of each."""
    return isinstance(getattr(processor, "prompt_ignore_length", None), Tensor) or hasattr(
        processor, "_prefix_allowed_tokens_fn"
    )


def _processed(processor: Any, batch: int | None, text: int, ids: Tensor, logits: Tensor) -> Tensor:
    """What the logits processors make of [vocabulary] logits after one text of a batch.

    batch: so many times they are given it, so that it has its number; None: they do not go by that.
    """
    if batch is None:
        found: Tensor = processor(ids[None], logits[None].clone())[0]
        return found
    return cast(Tensor, processor(ids.expand(batch, -1), logits.repeat(batch, 1))[text])


def _greedy(scores: list[Tensor], guesses: list[int], proposals: list[Tensor]) -> tuple[list[int], int]:
    """The guesses that are what the model itself would say, and what it says after them."""
    for n, guess in enumerate(guesses):
        own = int(scores[n].argmax())
        if own != guess:
            return guesses[:n], own
    return guesses, int(scores[len(guesses)].argmax())


def _sampled(scores: list[Tensor], guesses: list[int], proposals: list[Tensor]) -> tuple[list[int], int]:
    """Guesses accepted by lot, and a token drawn from what is left of the model's distribution."""
    for n, guess in enumerate(guesses):
        p, q = scores[n].softmax(-1), proposals[n].softmax(-1)
        if not float(torch.rand((), device=p.device)) * float(q[guess]) < float(p[guess]):
            left = (p - q).clamp(min=0)
            return guesses[:n], int(torch.multinomial(left if left.any() else p, 1))
    return guesses, int(torch.multinomial(scores[len(guesses)].softmax(-1), 1))

"""Prompt lookup decoding: tokens that followed the last ones where these stood before in the text are drafted, and the compiled
CPU step verifies them with the full cache, in one pass over the weights.

There is no second cache. The step gives a token the same logits, bit for bit, in a pass of one token or of several
(decoding/cpu.py), so greedy output equals that of the step alone: of `model.generate` inside
`apply(model, Plan.full(model), exact=False)`. A guess is one more row of matrix products that are limited by reading weights, so
it costs a fraction of a token. How many are drafted follows from measured times, and from how often guesses were right so far,
by the length of the match. Tokens that were decoded without a draft say so at no cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headsink.cache.cache import PlanCache
from headsink.decoding.cpu import Decoder
from headsink.generation.acceptance import AGAIN, MOST, accept_greedy, accept_sampled, running_mean
from headsink.generation.sequences import Sequences, Speculation
from headsink.models.spec import describe

GRAMS = (3, 2, 1)  # tokens that must be the same for a match, the longest first
# By length of a match, the share of right guesses in the built-in prose, code and chat (calibration parts of 4,000 tokens).
RIGHT = (0.0, 0.16, 0.29, 0.43, 0.58, 0.64, 0.68, 0.7, 0.87)
SLOPE = 0.15  # a further token of a pass, relative to the first: a guess until one is measured


class Guess(NamedTuple):
    """match: tokens before the place found that equal the last ones of the text, 0 if none is found. tokens: those after it."""

    match: int
    tokens: list[int]


class Lookup:
    """What followed the last tokens of a text where the same ones stood before."""

    def __init__(self, ids: list[int]) -> None:
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}  # the last tokens before a position -> the last such position
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        for gram in GRAMS:
            if len(self.ids) >= gram:
                self.after[tuple(self.ids[-gram:])] = len(self.ids)
        self.ids.append(token)

    def find(self) -> Guess:
        """Guess `MOST` tokens, which repeat if fewer have followed."""
        ids = self.ids
        at = next((at for gram in GRAMS if (at := self.after.get(tuple(ids[-gram:]))) is not None), None)
        if at is None:
            return Guess(0, [])
        match = 1
        while match < min(len(RIGHT) - 1, at) and ids[at - 1 - match] == ids[-1 - match]:
            match += 1
        return Guess(match, [ids[at + n % (len(ids) - at)] for n in range(MOST)])


class LookupLength:
    """Choose how many tokens to draft, by expected tokens per second.

    right: share of guesses that are right, by match. hoped, held: right guesses per pass that these shares promised, and that
    there were. A text that keeps fewer of them is drafted less, at once for all matches.
    """

    def __init__(self) -> None:
        self.right = list(RIGHT)
        self.hoped, self.held = 2.0, 1.0  # at first, half of a promise is believed
        self.slope, self.single, self.several = SLOPE, 0.0, 0  # relative, seconds, passes of several tokens
        self.idle, self.patience = 0, AGAIN

    def choose(self, matches: list[int]) -> int:
        """Return the number of tokens to draft. matches: of each row, 0 if it has no guess."""
        if not any(matches) or not self.single:
            return 0
        trust = min(1.0, self.held / self.hoped)
        gains = [len(matches) + trust * self._promised(matches, count) for count in range(MOST + 1)]
        best = max(range(MOST + 1), key=lambda count: gains[count] / (1 + self.slope * count))
        if best:
            self.idle = 0
        elif (idle := self.idle + 1) >= self.patience:  # measure again
            self.idle, self.patience, best = 0, 2 * self.patience, 1
        else:
            self.idle = idle
        return best

    def _promised(self, matches: list[int], count: int) -> float:
        """Right guesses of all rows in a pass with `count` drafts. A token that was right lengthens the match."""
        total = 0.0
        for match in filter(None, matches):
            chance = 1.0
            for n in range(count):
                chance *= self._chance(match + n)
                total += chance
        return total

    def _chance(self, match: int) -> float:
        return self.right[min(match, len(self.right) - 1)]

    def judge(self, match: int, right: bool) -> None:
        """Record whether a guess after `match` tokens was right."""
        match = min(match, len(self.right) - 1)
        self.right[match] = running_mean(self.right[match], float(right))

    def settle(self, matches: list[int], drafted: int, accepted: int) -> None:
        """Record how many tokens of a pass were accepted, of all rows, before `judge` learns from them."""
        if drafted:
            self.hoped = running_mean(self.hoped, self._promised(matches, drafted))
            self.held = running_mean(self.held, accepted)

    def update(self, drafted: int, seconds: float) -> None:
        """Record a pass. The first of several tokens also allocates memory."""
        if not drafted:
            self.single = running_mean(self.single or None, seconds)
        elif self.several:
            slope = max(0.0, seconds / self.single - 1) / drafted
            self.slope = slope if self.several == 1 else running_mean(self.slope, slope)
        self.several += bool(drafted)


class LookupDecoder(Sequences):
    """State of a batch. The model must have a compiled step on a CPU; `full` is a filled cache of an all-full plan."""

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, position: Tensor, full: PlanCache):
        super().__init__(input_ids, position, full)
        self.step, self.dtype = Decoder(model, full), model.dtype
        self.lookups = [Lookup(text.tolist()) for text in self.texts]
        # Hidden columns would count in a window: there all rows accept as many tokens as the row with the fewest.
        self.ragged = all(window is None for window in describe(model).windows)
        self.longest = describe(model).max_context
        self.follow = False  # whether positions are those of the columns

    def run(
        self,
        processed: Callable[[int, Tensor, Tensor], Tensor],
        stop: Any,
        *,
        sample: bool,
        told: Speculation,
        streamer: Any = None,
        first: Tensor | None = None,
    ) -> None:
        """Decode until all sequences end; arguments as for `SpeculativeDecoder.run`.

        first: logits after the last token of each, [rows, vocabulary], if the cache has it; None if the cache lacks it.
        """
        pick, pace = accept_sampled if sample else accept_greedy, LookupLength()
        if first is not None:
            picks = [pick([processed(text, self.texts[text], first[text].float())], [], []) for text in self.rows]
            self._grow(picks, stop, streamer)
        pads = 0 if self.full.padding is None else self.full.padding.tokens
        self.follow = bool((self.position == self.full.get_seq_length() - pads).all())
        while self.rows:
            start = time.perf_counter()
            guesses = [self.lookups[text].find() for text in self.rows]
            room = self.longest - self.full.get_seq_length() - 1
            drafted = min(pace.choose([guess.match for guess in guesses]), max(room, 0))
            logits = self._read(guesses, drafted)
            picks = []
            for row, (text, guess) in enumerate(zip(self.rows, guesses, strict=True)):
                own, ids = guess.tokens[:drafted], self.texts[text]
                ahead = torch.cat([ids, ids.new_tensor(own)])
                scores = [processed(text, ahead[: len(ids) + n], logits[row, n]) for n in range(len(own) + 1)]
                picks.append(pick(scores, own, []))
            pace.settle([guess.match for guess in guesses], drafted, sum(len(accepted) for accepted, _ in picks))
            for guess, (accepted, last) in zip(guesses, picks, strict=True):
                _judge(pace, guess, drafted, accepted, last)
            least = min(len(accepted) for accepted, _ in picks)
            if not self.ragged:
                picks = [(own[:least], [*own, last][least]) for own, last in picks]
            told.passes, told.drafted = told.passes + 1, told.drafted + drafted * len(picks)
            told.accepted += sum(len(accepted) for accepted, _ in picks)
            told.lengths.append(drafted)
            self._accept(drafted, [len(accepted) for accepted, _ in picks])
            self._grow(picks, stop, streamer)
            pace.update(drafted, time.perf_counter() - start)

    def _read(self, guesses: list[Guess], drafted: int) -> Tensor:
        """Logits after the last token and each drafted one, float32 [rows, drafted + 1, vocabulary], rounded as the model's."""
        last = [int(self.texts[text][-1]) for text in self.rows]
        drafts = [guess.tokens[:drafted] or [token] * drafted for guess, token in zip(guesses, last, strict=True)]
        tokens = torch.tensor([[token, *own] for token, own in zip(last, drafts, strict=True)])
        positions = None if self.follow else self.position[:, None] + torch.arange(drafted + 1)
        logits = self.step.read(tokens, positions)
        self.step.start_evicting()
        return logits.to(self.dtype).float()

    def _accept(self, drafted: int, accepted: list[int]) -> None:
        """Leave in the cache the last token and the accepted ones of each row."""
        counts = torch.tensor(accepted)
        columns = int(counts.max()) + 1
        if columns <= drafted:
            self.step.crop(drafted + 1 - columns)
        hidden = torch.arange(columns) >= counts[:, None] + 1
        if hidden.any():
            self.full.hide(hidden)
            self.follow = False
        self.position = self.position + counts

    def _grow(self, picks: list[tuple[list[int], int]], stop: Any, streamer: Any) -> None:
        """Append the accepted tokens and the one after them to the sequences, and leave out those that have ended."""
        unfinished = []
        for row, (accepted, last) in enumerate(picks):
            text = self.rows[row]
            before = len(self.texts[text])
            unfinished.append(self.append(row, [*accepted, last], stop, streamer))
            for token in self.texts[text][before:].tolist():
                self.lookups[text].append(token)
        self.position = self.position + 1
        self.drop(unfinished, self.full)
        if self.rows and not all(unfinished):
            self.step.resume()


def _judge(pace: LookupLength, guess: Guess, drafted: int, accepted: list[int], last: int) -> None:
    """Record which guesses were right: those up to the first wrong one, or the first one if none was drafted."""
    if guess.match:
        for n, token in enumerate([*accepted, last][: max(drafted, 1)]):
            pace.judge(guess.match + n, token == guess.tokens[n])

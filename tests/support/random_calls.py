"""Random calls of models under plans, valid and invalid. `python random_calls.py SEED GAMES` runs games and prints the results.

A game is a sequence of random calls over a few caches, of two tiny Llamas of different shapes in float32 or bfloat16, under plans
of all kinds. A call must give a result of the right shape, `HeadsinkError`, or one of `ALLOWED`. Half of the games are plain
forward passes in float32: they are repeated without kernels and must give the same logits.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import re
import sys
import threading
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from plans import random_plan, window_plan
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from headsink import HeadsinkError, Plan, apply, generate_lossless, new_cache
from headsink.decoding.step import decoder
from headsink.models.transformers_names import cache_argument

CALLS = 12  # per game
VOCABULARY = 61
SHAPES = ({"num_key_value_heads": 2, "head_dim": 12}, {"num_key_value_heads": 4, "head_dim": 16})
ALL_SHAPES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Errors of torch and transformers for input that does not reach headsink: (call, words of the message, reason).
ALLOWED = (
    (
        "generate|lossless",
        "^index -1 is out of bounds for dimension 1 with size 0",
        "`generate` looks at a prompt's last token",
    ),
    ("generate", "^assisted generate is only supported for batch_size = 1", "prompt lookup takes one text"),
    (
        "generate",
        r"^The size of tensor a .* must match .* at non-singleton dimension [02]",
        "positions are made of any mask",
    ),
    (
        "forward",
        "^cannot reshape tensor of 0 elements",
        "no tokens, outside of `apply`: not even the full model takes that",
    ),
    ("copy", "^Only Tensors created explicitly by the user", "torch copies no tensors that carry gradients"),
)


@dataclass
class GameCache:
    """A cache of the game. rows: 0 while it is empty."""

    cache: Any
    model: int
    plan: Plan

    @property
    def rows(self) -> int:
        return int(self.cache.rows)

    @property
    def length(self) -> int:
        return int(self.cache.get_seq_length())


def make_model(shape: int, kind: torch.dtype, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**ALL_SHAPES | SHAPES[shape])).to(kind).eval()


class Game:
    """Random calls from a seed. plain: only forward passes and changes of caches, in float32, so that no result depends on a
    choice between nearly equal logits."""

    def __init__(self, seed: int):
        self.rng, self.plain = random.Random(seed), seed % 2 == 0
        kinds = [torch.float32] if self.plain else [torch.float32, torch.bfloat16]
        self.models = [make_model(shape, self.rng.choice(kinds), seed) for shape in range(2)]
        self.plans = [[random_plan(m, seed), Plan.full(m), window_plan(m, seed)] for m in self.models]
        torch.manual_seed(seed)
        self.caches = [self._new() for _ in range(2)]
        self.log: list[tuple[str, str, Any]] = []  # of every call: name, outcome, logits

    def play(self) -> None:
        calls = [self.forward] * 10 + [
            self.crop,
            self.rows,
            self.order,
            self.copy,
            self.record,
            self.freeze,
            self.renew,
        ]
        calls += [self.reset]
        if not self.plain:
            calls += [self.generate] * 8 + [self.lossless, self.step, self.step, self.step, self.change, self.threads]
        for _ in range(CALLS):
            call = self.rng.choice(calls)
            try:
                outcome, found = "ok", call()
                if found is None:
                    found = torch.zeros(0)
                elif not bool(torch.isfinite(found).all()):
                    outcome = "not finite"
            except HeadsinkError as error:
                outcome, found = "refused", torch.zeros(0)
                if "\n" in str(error) or not str(error):
                    outcome = f"not one line: {error}"
            except Exception as error:  # allowed errors are checked here
                outcome, found = self._check_error(call.__name__, error), torch.zeros(0)
            self.log.append((call.__name__, outcome, found))

    def _check_error(self, name: str, error: Exception) -> str:
        for call, words, _ in ALLOWED:
            if re.fullmatch(call, name) and re.search(words, str(error)):
                return f"allowed: {words}"
        where = [f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-6:]
        return f"{type(error).__name__}: {error} {where}"

    # inputs of calls

    def _new(self) -> GameCache:
        model = self.rng.randrange(2)
        plan = self.rng.choice(self.plans[model])
        return GameCache(new_cache(self.models[model], plan, exact=self.rng.random() < 0.5), model, plan)

    def _some(self) -> tuple[GameCache, int]:
        """A cache and a model, mostly the matching one."""
        entry = self.rng.choice(self.caches)
        return entry, entry.model if self.rng.random() < 0.93 else 1 - entry.model

    def _ids(self, rows: int, tokens: int) -> torch.Tensor:
        ids = [self.rng.randrange(3, VOCABULARY) for _ in range(rows * tokens)]
        return torch.tensor(ids, dtype=torch.long).view(rows, tokens)

    def _rows_for(self, entry: GameCache) -> int:
        return entry.rows if entry.rows and self.rng.random() < 0.85 else self.rng.randint(1, 3)

    def _mask(self, rows: int, columns: int) -> torch.Tensor | None:
        kind, mask = self.rng.random(), torch.ones(rows, columns, dtype=torch.long)
        if kind < 0.6:
            return None
        if kind < 0.85:  # left padding, sometimes of a whole row
            for row in range(rows):
                mask[row, : self.rng.randint(0, min(columns, 12))] = 0
            return mask
        if kind < 0.89:
            return torch.ones(rows, max(0, columns + self.rng.choice([-3, -1, 1, 4])), dtype=torch.long)
        if kind < 0.93:
            return torch.ones(rows + 1, columns, dtype=torch.long)
        if kind < 0.97:
            mask[self.rng.randrange(rows), self.rng.randrange(max(columns, 1)) : columns] = 0
            return mask
        return mask.bool() if kind < 0.985 else mask.float()

    def _context(self) -> Any:
        kind = self.rng.random()
        if kind < 0.75:
            return torch.no_grad()
        if kind < 0.85:
            return torch.inference_mode()
        if kind < 0.92 and not self.plain:
            return torch.autocast("cpu", torch.bfloat16)
        return contextlib.nullcontext()

    # calls

    def forward(self) -> Any:
        entry, model = self._some()
        cache = cache_argument(entry.cache) if self.rng.random() < 0.9 else {}
        rows, tokens = self._rows_for(entry), self.rng.choice([0, 1, 1, 1, 1, 1, 2, 3, 4, 9, 17, 40])
        ids, before = self._ids(rows, tokens), entry.length if cache else 0
        given: dict[str, Any] = dict(cache)
        mask = self._mask(rows, before + tokens)
        if mask is not None:
            given["attention_mask"] = mask
            if mask.shape == (rows, before + tokens):
                given["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, before:]
        inside = apply(self.models[model], self.rng.choice(self.plans[model]), compiled=self.rng.choice([None, False]))
        if cache and self.rng.random() < 0.03:
            inside = contextlib.nullcontext()  # type: ignore[assignment]
        with self._context(), inside:
            logits = self.models[model](ids, **given).logits
        assert logits.shape == (rows, tokens, VOCABULARY), logits.shape
        return logits.detach().float()

    def generate(self) -> None:
        entry, model = self._some()
        options: dict[str, Any] = self.rng.choice(
            [
                {},
                {"num_beams": 2},
                {"do_sample": True, "num_return_sequences": 2},
                {"num_beams": 2, "num_return_sequences": 2},
                {"use_cache": False},
                {"prompt_lookup_num_tokens": 2},
                {"do_sample": True},
                {"prefill_chunk_size": 3},
            ]
        )
        cache = cache_argument(entry.cache) if self.rng.random() < 0.5 else {}
        rows, before = self._rows_for(entry), entry.length if cache else 0
        tokens = max(0, before + self.rng.choice([0, 1, 1, 1, 5, 20, -2]))
        mask = self._mask(rows, tokens)
        given = {} if mask is None else {"attention_mask": mask}
        most = self.rng.randint(1, 4)
        with (
            self._context(),
            apply(self.models[model], self.rng.choice(self.plans[model]), compiled=self.rng.choice([None, False])),
        ):
            found = self.models[model].generate(
                self._ids(rows, tokens), **given, **cache, max_new_tokens=most, **{"do_sample": False, **options}
            )
        assert len(found) == rows * options.get("num_return_sequences", 1), found.shape
        assert tokens < found.shape[1] <= tokens + most, (found.shape, tokens, most)

    def lossless(self) -> None:
        model, rows, tokens = self.rng.randrange(2), self.rng.randint(1, 3), self.rng.choice([0, 1, 5, 30])
        mask = self._mask(rows, tokens)
        given = {} if mask is None else {"attention_mask": mask}
        plan = self.rng.choice(self.plans[self.rng.choice([model, model, model, 1 - model])])
        found = generate_lossless(
            self.models[model],
            plan,
            self._ids(rows, tokens),
            max_new_tokens=3,
            do_sample=self.rng.random() < 0.3,
            **given,
        )
        assert len(found) == rows
        assert tokens < found.shape[1] <= tokens + 3

    def step(self) -> Any:
        """Decode some tokens with the compiled decode step, sometimes with a change between."""
        entry, model = self._some()
        step, logits = decoder(self.models[model], entry.cache), torch.zeros(0)
        try:
            for _ in range(self.rng.randint(1, 5)):
                rows = self._rows_for(entry)
                logits = step.run(self._ids(rows, 1)[:, 0])
                assert logits.shape == (rows, VOCABULARY)
                if self.rng.random() < 0.15:
                    step.start_evicting()
                    self.rng.choice([self.rows, self.order, self.crop, self.change, self.freeze])()
                    if self.rng.random() < 0.5:
                        step.resume()
        finally:
            with contextlib.suppress(HeadsinkError):
                step.start_evicting()
        return logits

    def crop(self) -> None:
        entry = self.rng.choice(self.caches)
        entry.cache.crop(-self.rng.choice([0, 1, 1, 2, 5, 1000]) if self.rng.random() < 0.95 else 2)

    def rows(self) -> None:
        entry = self.rng.choice(self.caches)
        if self.rng.random() < 0.5:
            entry.cache.batch_repeat_interleave(self.rng.choice([1, 2]))
        elif entry.rows:
            keep = sorted(self.rng.sample(range(entry.rows), self.rng.randint(1, entry.rows)))
            entry.cache.batch_select_indices(torch.tensor(keep))
        if entry.rows > 6:
            entry.cache.batch_select_indices(torch.tensor([0]))

    def order(self) -> None:
        entry = self.rng.choice(self.caches)
        if entry.rows:
            entry.cache.reorder_cache(torch.tensor([self.rng.randrange(entry.rows) for _ in range(entry.rows)]))

    def reset(self) -> None:
        self.rng.choice(self.caches).cache.reset()

    def copy(self) -> None:
        entry = self.rng.choice(self.caches)
        self.caches[self.rng.randrange(2)] = GameCache(copy.deepcopy(entry.cache), entry.model, entry.plan)

    def record(self) -> None:
        self.rng.choice(self.caches).cache.activate_past_recording()

    def freeze(self) -> None:
        self.rng.choice(self.caches).cache.freeze()

    def renew(self) -> None:
        self.caches[self.rng.randrange(2)] = self._new()

    def change(self) -> None:
        model = self.rng.choice(self.models)
        model.to(self.rng.choice([torch.float32, torch.bfloat16]))

    def threads(self) -> None:
        """Use both caches in two threads, if their rows can continue."""
        errors: list[Exception] = []
        given = [(entry, self._ids(entry.rows or 1, tokens)) for entry, tokens in zip(self.caches, (1, 9), strict=True)]

        def work(entry: GameCache, ids: torch.Tensor) -> None:
            try:
                with torch.no_grad(), apply(self.models[entry.model], entry.plan):
                    for _ in range(2):
                        self.models[entry.model](ids, **cache_argument(entry.cache))
            except Exception as error:  # raised below, in the game's thread
                errors.append(error)

        running = [threading.Thread(target=work, args=one) for one in given if given[0][0].cache is not one[0].cache]
        running.append(threading.Thread(target=work, args=given[0]))
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        for error in sorted(errors, key=lambda error: isinstance(error, HeadsinkError)):
            raise error


@contextlib.contextmanager
def without_kernels() -> Any:
    """Run everything in torch."""
    from headsink.attention import backends

    before = backends.backend_for
    backends.backend_for = lambda *_: None
    try:
        yield
    finally:
        backends.backend_for = before


def run_game(seed: int) -> tuple[Counter[str], list[str]]:
    """Run a game; returns counts of its outcomes, and the outcomes that are wrong."""
    game, wrong = Game(seed), []
    game.play()
    counts = Counter(f"{name}: {outcome.split(':')[0]}" for name, outcome, _ in game.log)
    for number, (name, outcome, _) in enumerate(game.log):
        if outcome not in ("ok", "refused") and not outcome.startswith("allowed: "):
            wrong.append(f"seed {seed}, call {number}, {name}: {outcome}")
    if game.plain:
        with without_kernels():
            again = Game(seed)
            again.play()
        for number, (one, other) in enumerate(zip(game.log, again.log, strict=True)):
            where = f"seed {seed}, call {number}, {one[0]}"
            if one[:2] != other[:2]:
                wrong.append(f"{where}: {one[1]}; without kernels {other[:2]}")
                break
            if one[2].shape != other[2].shape or not torch.allclose(one[2], other[2], rtol=1e-3, atol=1e-3):
                most = float((one[2] - other[2]).abs().max())
                wrong.append(f"{where}: logits differ by {most} from those without kernels")
                break
    return counts, wrong


def _report(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main(first: int, games: int) -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    for seed in range(first, first + games):
        _report({"seed": seed})
        counts, wrong = run_game(seed)
        _report({"seed": seed, "counts": counts, "wrong": wrong})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

"""Prompt lookup on a CPU: the tokens are those of the compiled step with the full cache, however many are drafted."""

import copy

import pytest
import torch
from families import FAMILIES, tiny
from feeding import padded
from plans import random_plan

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.decoding.step import decoder, refusal
from headsink.generation import lookup
from headsink.generation.acceptance import AGAIN, MOST
from headsink.generation.lookup import Guess, Lookup, LookupDecoder, LookupLength
from headsink.generation.lossless import generate_lossless
from headsink.generation.sequences import Speculation
from headsink.models.transformers_names import cache_argument


def own(model, ids, **options):
    """The tokens of the compiled step with the full cache."""
    with headsink.apply(model, Plan.full(model), exact=False):
        return model.generate(ids, **{"max_new_tokens": 24, "do_sample": False} | options)


def lossless(model, ids, **options):
    return generate_lossless(model, random_plan(model, 1), ids, **{"max_new_tokens": 24, "do_sample": False} | options)


def filled(model, ids, plan=None, kv_dtype="auto"):
    plan = Plan.full(model) if plan is None else plan
    cache = headsink.new_cache(model, plan, exact=False, kv_dtype=kv_dtype)
    with headsink.apply(model, plan, compiled=False, exact=False), torch.no_grad():
        model(ids, **cache_argument(cache))
    return cache


def repeating(family, dtype=torch.float32, attention=0.02):
    """A model whose next token depends mostly on the last one, so its text repeats. attention: what is left of its outputs."""
    model = tiny(family, dtype=dtype)
    for name, weight in model.named_parameters():
        if "o_proj" in name:
            weight.data *= attention
    return model


@pytest.fixture
def drafts(monkeypatch):
    """Draft numbers of tokens in turn, whether they pay or not."""
    turns = []

    def choose(self, matches):
        turns.append(4 * len(turns) % (MOST + 1) if self.single else 0)
        return turns[-1]

    monkeypatch.setattr(LookupLength, "choose", choose)
    return turns


@pytest.fixture
def threads():
    """Set the number of threads, which share rows of weights and blocks of keys."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_several_tokens_are_those_of_one_after_the_other(family, dtype, threads, case_seed):
    """Bit for bit, across blocks of keys, in windows that wrap, and with other sequences or without."""
    threads(case_seed % 3 + 1)
    model, generator = tiny(family, dtype=dtype), torch.Generator().manual_seed(case_seed)
    assert refusal(model) is None
    for length in (1, 9, 126, 255):
        ids = torch.randint(3, 211, (3, length + 9), generator=generator)
        before = filled(model, ids[:, :length])
        step = decoder(model, copy.deepcopy(before))
        expected = torch.stack([step.run(ids[:, length + n]) for n in range(9)], 1)
        for tokens in (2, 3, 4, 5, 9):
            step = decoder(model, copy.deepcopy(before))
            found = [step.read(part) for part in ids[:, length:].split(tokens, 1)]
            assert torch.equal(torch.cat(found, 1), expected)
        before.batch_select_indices(torch.tensor([1]))
        assert torch.equal(decoder(model, before).read(ids[1:2, length:]), expected[1:2])


@pytest.mark.parametrize("tokens", [2, 5])
@pytest.mark.parametrize("positions", ["absolute", "cache-relative"])
def test_several_tokens_in_a_cache_that_evicts(tokens, positions, case_seed):
    model = tiny("llama")
    plan = random_plan(model, case_seed)
    if positions != "absolute":
        plan = Plan.uniform(model, Pattern(2, 0, 7), positions=positions)
    ids = torch.randint(3, 211, (2, 70))
    caches = [filled(model, ids[:, :30], plan) for _ in range(2)]
    one, other = (decoder(model, cache) for cache in caches)
    expected = torch.stack([one.run(ids[:, n]) for n in range(30, 70)], 1)
    assert torch.equal(torch.cat([other.read(part) for part in ids[:, 30:].split(tokens, 1)], 1), expected)
    if positions == "absolute":
        with pytest.raises(HeadsinkError, match="a cache that evicts cannot take tokens back"):
            other.crop(1)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3"])
def test_tokens_that_are_taken_back_leave_no_trace(family, kv_dtype):
    model = tiny(family)
    ids = torch.randint(3, 211, (2, 160))
    before = filled(model, ids[:, :9], kv_dtype=kv_dtype)  # below the window of 11
    one, other = (decoder(model, copy.deepcopy(before)) for _ in range(2))
    at, turn = 9, 0
    while at < 140:
        count, turn = turn % 9 + 1, turn + 1
        kept = turn * 5 % count + 1
        wrong = torch.randint(3, 211, (2, count - kept))
        found = other.read(torch.cat([ids[:, at : at + kept], wrong], 1))[:, :kept]
        if kept < count:
            other.crop(count - kept)
        assert torch.equal(found, torch.stack([one.run(ids[:, n]) for n in range(at, at + kept)], 1))
        at += kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_compiled_step(family, dtype, drafts):
    model, (ids, mask) = repeating(family, dtype), padded()
    ends = {"attention_mask": mask, "eos_token_id": list(range(7, 13)), "pad_token_id": 0}  # at different times
    for given, options in ((ids, ends), (ids[:1], {}), (ids[:1, :1], {})):
        speculation, options = Speculation(), options | {"max_new_tokens": 40}
        found = lossless(model, given, speculation=speculation, **options)
        assert torch.equal(found, own(model, given, **options))
        assert speculation.kv_bytes > 0
    assert set(range(MOST + 1)) == set(drafts)


def test_text_that_repeats_takes_fewer_passes(monkeypatch):
    """With the time of a pass that does not depend on its tokens."""
    model = repeating("llama", attention=0)
    monkeypatch.setattr(lookup.time, "perf_counter", iter(range(10**9)).__next__)
    ids, speculation = torch.randint(3, 211, (1, 40)), Speculation()
    found = lossless(model, ids, max_new_tokens=400, speculation=speculation)
    assert torch.equal(found, own(model, ids, max_new_tokens=400))
    assert speculation.passes + speculation.accepted >= 399  # the last pass may accept more than are asked for
    assert speculation.passes < 120
    assert speculation.acceptance > 0.8


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.3, "no_repeat_ngram_size": 4}, {"min_new_tokens": 20}])
def test_options_of_generate_are_kept(options, drafts):
    model, (ids, mask) = repeating("qwen3"), padded()
    options |= {"attention_mask": mask, "eos_token_id": list(range(3, 60)), "pad_token_id": 0}
    assert torch.equal(lossless(model, ids, **options), own(model, ids, **options))


def test_samples_have_the_distribution_of_the_full_cache(drafts):
    """Tokens whose guesses are accepted or not, as frequent as without guesses."""
    model, rows = repeating("llama", attention=0), 4000
    for parameter in model.parameters():  # so that no token has probability near 1
        parameter.data *= 0.7
    with torch.no_grad():
        likely = model(torch.arange(211)[:, None]).logits[:, -1].topk(3).indices  # after every token
    near = likely[likely[5]].flatten()
    text = torch.stack([near, likely[near, 0]], 1).flatten()  # so that the likely next ones have guesses
    ids = torch.cat([text, torch.tensor([5])])[None]
    options = {"do_sample": True, "top_k": 3, "temperature": 2.0, "max_new_tokens": 4}
    speculation = Speculation()
    found = lossless(model, ids.repeat(rows, 1), speculation=speculation, **options)[:, ids.shape[1] :]
    assert 0 < speculation.acceptance < 1
    expected = own(model, ids.repeat(rows, 1), **options)[:, ids.shape[1] :]
    for column in range(4):
        counts = [torch.bincount(one[:, column], minlength=211) / rows for one in (found, expected)]
        assert float((counts[0] - counts[1]).abs().max()) < 0.05  # 4 standard deviations of a difference


def test_a_lookup_finds_what_followed_the_last_tokens_before():
    found = Lookup([1, 2, 3, 4, 5, 6, 2, 3])
    assert found.find() == Guess(2, [4, 5, 6, 2, 3, 4, 5, 6])
    found.append(4)
    assert found.find() == Guess(3, [5, 6, 2, 3, 4, 5, 6, 2])
    for token in (9, 2, 3, 4):
        found.append(token)
    assert found.find() == Guess(3, [9, 2, 3, 4, 9, 2, 3, 4])  # the last place, not the first
    assert Lookup([1, 2]).find() == Guess(0, [])
    assert Lookup([7] * 40).find() == Guess(8, [7] * MOST)
    assert Lookup([*range(20), 0, 1, 2]).find() == Guess(3, list(range(3, 3 + MOST)))


def test_guesses_are_drafted_where_they_pay():
    pace = LookupLength()
    assert pace.choose([8]) == 0  # the time of one token is not known
    pace.update(0, 1.0)
    assert pace.choose([0]) == 0
    assert pace.choose([8]) >= pace.choose([3]) >= 1
    for seconds in (9.0, 1.8, 1.8):  # the first of several tokens is not counted
        pace.update(8, seconds)
    assert pace.slope == pytest.approx(0.1)
    for _ in range(60):
        pace.judge(3, False)
    assert pace.choose([3]) == 0
    assert pace.choose([8]) > 1
    assert pace.choose([8] + [0] * 15) == 0  # the other rows would pay for it
    pace.choose([8])
    for again in (AGAIN, 2 * AGAIN, 4 * AGAIN):  # measured again, less and less often
        assert [pace.choose([3]) for _ in range(again)] == [0] * (again - 1) + [1]


def test_a_text_that_keeps_few_promises_is_drafted_less():
    """And more again, once guesses are right."""
    pace = LookupLength()
    pace.update(0, 1.0)
    before = pace.choose([5])
    for _ in range(30):
        pace.settle([5], before, 0)
    assert pace.choose([5]) == 0
    for _ in range(30):
        pace.settle([5], before, before)
    assert pace.choose([5]) >= before > 0


def test_drafts_end_at_the_maximum_of_the_model(drafts):
    model = repeating("llama")
    ids = torch.randint(3, 211, (1, 500))
    found = lossless(model, ids, max_new_tokens=12)  # its maximum is 512
    assert torch.equal(found, own(model, ids, max_new_tokens=12))
    assert max(drafts) > 0


def test_step_of_a_row_that_ends_early(drafts):
    """Rows that end leave the cache, so the step reads its buffers again."""
    model, (ids, _) = repeating("llama-mha"), padded(batch=4)
    length = ids.shape[1]
    state = LookupDecoder(model, ids, torch.full((4,), length - 1), filled(model, ids[:, :-1]))
    ends = {tuple(text[:5].tolist()): length + 5 * n + 1 for n, text in enumerate(ids)}

    def stop(text, _):
        return torch.tensor([text.shape[1] >= ends[tuple(text[0, :5].tolist())]])

    state.run(lambda _, ids, logits: logits, stop, sample=False, told=Speculation())
    for n, text in enumerate(state.texts):
        cache = filled(model, ids[n : n + 1, :-1])
        step, expected = decoder(model, cache), ids[n].tolist()
        while len(expected) < length + 5 * n + 1:
            expected.append(int(step.run(torch.tensor(expected[-1:])).argmax()))
        assert text.tolist() == expected

"""A model under a plan equals the reference for any division into chunks; an all-full plan equals the model."""

import copy
import gc
import threading

import pytest
import torch
from families import EAGER, FAMILIES, WINDOWS, tiny
from feeding import TOLERANCE, WAYS, feed, padded, split
from plans import QUALITY, random_plan
from reference import reference_logits
from transformers import DynamicCache, StaticCache

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.attention.passes import engage
from headsink.cache.cache import PlanCache
from headsink.eviction.scorers import LINEAR
from headsink.models.transformers_names import cache_argument, returned_cache
from headsink.plan.schema import Quality


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_any_plan_equals_the_reference(family, way, padding, case_seed):
    model = tiny(family, dtype=torch.float64)
    ids, mask = padded() if padding else (torch.randint(3, 211, (2, 61)), None)
    plan = random_plan(model, case_seed)
    expected = reference_logits(model, plan, ids, mask, split(ids.shape[1], WAYS[way]))
    logits, _ = feed(model, plan, ids, WAYS[way], mask)
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(logits[real], expected[real], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_any_plan_equals_the_reference_with_kernels(family, way, padding, case_seed):
    """float64 runs in torch, float32 in compiled kernels."""
    model, exact = tiny(family), tiny(family, dtype=torch.float64)
    ids, mask = padded() if padding else (torch.randint(3, 211, (2, 61)), None)
    real = slice(None) if mask is None else mask.bool()
    drawn = random_plan(model, case_seed)
    freezes = (None, 45) if case_seed % 2 else (45, None)
    for plan, freeze in zip((drawn, Plan.full(model)), freezes, strict=True):
        expected = reference_logits(exact, plan, ids, mask, split(ids.shape[1], WAYS[way], freeze), freeze)
        logits, _ = feed(model, plan, ids, WAYS[way], mask, freeze, exact=False)
        torch.testing.assert_close(logits[real].double(), expected[real], rtol=0, atol=3e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_any_frozen_plan_equals_the_reference(family, way, padding, case_seed):
    model, freeze = tiny(family, dtype=torch.float64), (1, 30, 45)[case_seed % 3]
    ids, mask = padded() if padding else (torch.randint(3, 211, (2, 61)), None)
    plan = random_plan(model, case_seed)
    expected = reference_logits(model, plan, ids, mask, split(ids.shape[1], WAYS[way], freeze), freeze)
    logits, _ = feed(model, plan, ids, WAYS[way], mask, freeze)
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(logits[real], expected[real], **TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_sparse_prefill_is_the_same_for_any_division(family, way, padding, case_seed):
    model = tiny(family, dtype=torch.float64)
    ids, mask = padded() if padding else (torch.randint(3, 211, (2, 61)), None)
    plan = random_plan(model, case_seed)
    logits, _ = feed(model, plan, ids, WAYS[way], mask, prefill="sparse")
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(logits[real], reference_logits(model, plan, ids, mask, [1] * 61)[real], **TOLERANCE)


def many_top_k(model, seed):
    """A plan whose heads keep few of 100 keys, most of them by score."""
    return random_plan(model, seed, lambda rng: Pattern(rng.choice([0, 2]), rng.choice([3, 12]), rng.choice([0, 5, 9])))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("chunk", [16, 48])
def test_chunks_end_segments(family, chunk):
    model, ids = tiny(family, dtype=torch.float64), torch.randint(3, 211, (2, 121))
    plan = many_top_k(model, 1)
    segments = [chunk] * (120 // chunk) + [120 % chunk] * (120 % chunk > 0) + [1]
    if segments[-2] != chunk:
        segments[-2:] = [121 % chunk]
    expected = reference_logits(model, plan, ids, None, segments)
    for sizes in ([121], [48, 73], [96, 25]):
        logits, _ = feed(model, plan, ids, sizes, chunk_size=chunk)
        torch.testing.assert_close(logits, expected, **TOLERANCE)
    with headsink.apply(model, plan, chunk_size=chunk), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, **TOLERANCE)
    logits, _ = feed(model, plan, ids, [20, 101], chunk_size=chunk)  # a call ends a segment, too
    first = [16, 4, 12] if chunk == 16 else [20, 28]
    rest = 121 - sum(first)
    segments = first + [chunk] * (rest // chunk) + [rest % chunk]
    torch.testing.assert_close(logits, reference_logits(model, plan, ids, None, segments), **TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_a_second_turn_is_another_segment(family, padding):
    model = tiny(family, dtype=torch.float64)
    ids, mask = padded(length=108) if padding else (torch.randint(3, 211, (2, 108)), None)
    real = slice(None) if mask is None else mask.bool()
    sizes = [50, *[1] * 10, 40, *[1] * 8]
    for seed in range(2):
        plan = many_top_k(model, seed)
        logits, _ = feed(model, plan, ids, [*sizes, 1], mask)
        expected = reference_logits(model, plan, ids, mask, sizes)
        torch.testing.assert_close(logits[real], expected[real], **TOLERANCE)
        other = reference_logits(model, plan, ids, mask, [50] + [1] * 58)
        assert (other[real] - expected[real]).abs().max() > 1e-3  # the test tells them apart


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama-mha"])
@pytest.mark.parametrize("sizes", [[1000], [200, 131, 1, 1, 9], [1]], ids=["one pass", "chunks", "token by token"])
@pytest.mark.parametrize("freeze", [None, 150])
def test_top_k_keys_that_are_replaced(family, sizes, freeze):
    model, (ids, mask) = tiny(family, dtype=torch.float64), padded(length=250)
    patterns = [Pattern(2, 5, 16), Pattern(0, 1, 0), Pattern(4, 2, 40), Pattern(1, 16, 1)]
    heads = model.config.num_key_value_heads
    rows = [[patterns[(layer + head) % 4] for head in range(heads)] for layer in range(3)]
    plan = Plan.of(model, rows, torch.randn(3, heads, LINEAR.n_features(12)))
    logits, cache = feed(model, plan, ids, sizes, mask, freeze)
    real = mask.bool()
    torch.testing.assert_close(
        logits[real], reference_logits(model, plan, ids, mask, split(250, sizes, freeze), freeze)[real], **TOLERANCE
    )
    for group in (group for layer in cache.layers for group in layer.groups):
        assert (group.scores > float("-inf")).all()


@pytest.mark.slow
def test_long_prefill_is_computed_in_blocks():
    model = tiny("llama")
    ids = torch.randint(3, 211, (1, 411))
    plan = random_plan(model, 7)
    logits, _ = feed(model, plan, ids, [1000])
    torch.testing.assert_close(logits, reference_logits(model, plan, ids), **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@torch.no_grad()
def test_all_full_plan_equals_the_model(family, padding):
    """Bit for bit in prefill and decode, because the same kernel gets the same numbers; also for any plan frozen from the start.
    Up to rounding where `sdpa` cannot express the model's attention."""
    model = tiny(family)
    ids, mask = padded() if padding else (torch.randint(3, 211, (2, 61)), None)
    plain, parts = DynamicCache(config=model.config), []
    for start, end in [(0, 40), (40, 41), (41, 42), (42, 61)]:
        options = {}
        if mask is not None:
            positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:]
            options = {"attention_mask": mask[:, :end], "position_ids": positions}
        parts.append(model(ids[:, start:end], **cache_argument(plain), **options).logits)
    real = slice(None) if mask is None else mask.bool()
    for plan, freeze in ((Plan.full(model), None), (Plan.full(model), 40), (random_plan(model, 1), 0)):
        logits, _ = feed(model, plan, ids, [40, 1, 1, 19], mask, freeze)
        torch.testing.assert_close(
            logits[real], torch.cat(parts, 1)[real], rtol=0, atol=2e-6 if family in (*EAGER, *WINDOWS) else 0
        )


@pytest.mark.parametrize("family", EAGER)
@torch.no_grad()
def test_other_caches_use_the_models_attention(family):
    model, (ids, mask) = tiny(family), padded(length=300)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for given in ({}, {"attention_mask": mask, "position_ids": positions}):
        expected, cache = model(ids, **given).logits, DynamicCache(config=model.config)
        with engage(model):
            found = [model(ids, **given).logits]
            for start, end in ((0, 20), (20, 299), (299, 300)):
                part = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]} if given else {}
                found.append(model(ids[:, start:end], **cache_argument(cache), **part).logits)
        real = mask.bool() if given else slice(None)
        for logits in (found[0], torch.cat(found[1:], 1)):
            torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)


@torch.no_grad()
def test_all_full_plan_equals_the_model_in_bfloat16():
    model = tiny("llama", dtype=torch.bfloat16)
    ids = torch.randint(3, 211, (2, 61))
    plain = DynamicCache(config=model.config)
    expected = [model(part, **cache_argument(plain)).logits for part in ids.split([50, 1, 10], 1)]
    logits, _ = feed(model, Plan.full(model), ids, [50, 1, 10])
    assert torch.equal(logits, torch.cat(expected, 1))


@torch.no_grad()
@pytest.mark.parametrize("freeze", [None, 60])
def test_bfloat16_error_is_that_of_the_model(freeze):
    half, whole, ids = tiny("llama", dtype=torch.bfloat16), tiny("llama"), torch.randint(3, 211, (1, 90))
    plan = Plan.uniform(whole, Pattern(2, 0, 9))
    logits, _ = feed(half, plan, ids, [60, 1], freeze=freeze)
    error = (logits.float() - reference_logits(whole, plan, ids, None, split(90, [60, 1], freeze), freeze)).abs().mean()
    assert error < 1.5 * (half(ids).logits.float() - whole(ids).logits).abs().mean()


# the cache


@pytest.mark.parametrize("freeze", [None, 250])
def test_the_cache_has_exactly_the_plans_keys(freeze):
    model = tiny("llama")
    patterns = [[Pattern(4, 0, 16), Pattern(0, 30, 8)], [Pattern(4, 0, 16)] * 2, [Pattern(), Pattern(1, 0, 0)]]
    plan = Plan.of(model, patterns, torch.randn(3, 2, LINEAR.n_features(12)))
    gc.collect()
    before = {id(t) for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}
    cache = feed(model, plan, torch.randint(3, 211, (1, 300)), [200, 1], freeze=freeze)[1]
    gc.collect()
    new = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and id(t) not in before]
    frozen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in new if t.numel()}
    assert cache.nbytes() == sum(frozen.values())
    slots = [group.keys.shape[1] * group.keys.shape[2] for layer in cache.layers for group in layer.groups]
    more = 0 if freeze is None else 128  # for the 50 tokens after
    assert slots == [20 + more, 38 + more, 2 * (20 + more), 384, 1 + more]


@pytest.mark.parametrize("chunk", [None, 128])
def test_every_layer_evicts_before_the_next_one_reads(chunk):
    """The peak of dense prefill is the plan and the full keys of one layer."""
    model, sizes, own = tiny("llama"), [], []
    plan = Plan.of(model, [[Pattern(4, 20, 16), Pattern(0, 0, 8)]] * 3, torch.randn(3, 2, LINEAR.n_features(12)))
    cache = headsink.new_cache(model, plan, chunk_size=chunk)

    def record(*_):
        sizes.append(
            [sum(t.untyped_storage().nbytes() for g in layer.groups for t in g.tensors()) for layer in cache.layers]
        )

    hooks = [layer.self_attn.register_forward_hook(record) for layer in model.model.layers]
    with headsink.apply(model, plan, compiled=False), torch.no_grad():
        model(torch.randint(3, 211, (1, 400)), **cache_argument(cache))
    for hook in hooks:
        hook.remove()
    own = sizes[-1]
    assert sizes == [[own[0], 0, 0], [own[0], own[1], 0], own]
    token = 2 * 12 * 4  # bytes of a key and a value of one head
    for layer, found in zip(cache.layers, own, strict=True):
        assert [group.keys.shape[2] for group in layer.groups] == [40, 8]
        assert 48 * token <= found < 60 * token + 2 * 4 * LINEAR.n_features(12)
    assert cache.nbytes() < 400 * 2 * token  # less than the full keys of one layer


def test_window_only_cache_stays_the_same_size():
    model, sizes = tiny("llama"), []
    plan = Plan.uniform(model, Pattern(4, 0, 16))
    for length in (30, 100, 400):
        sizes.append(feed(model, plan, torch.randint(3, 211, (2, length)), [50, 1])[1].nbytes())
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_crop_while_recording_leaves_no_trace(padding):
    model, plan = tiny("llama"), random_plan(tiny("llama"), 3)
    ids, mask = padded() if padding else (torch.randint(3, 211, (3, 61)), None)
    expected = reference_logits(model, plan, ids, mask, 30)
    cache, wrong = headsink.new_cache(model, plan), torch.randint(3, 211, (3, 200))

    def step(tokens, start):
        options = {}
        if mask is not None:
            full = torch.cat([mask[:, :start], torch.ones_like(tokens)], 1) if start else mask[:, : tokens.shape[1]]
            positions = (full.cumsum(1) - 1).clamp(min=0)[:, start:]
            options = {"attention_mask": full, "position_ids": positions}
        return model(tokens, **cache_argument(cache), **options).logits

    with headsink.apply(model, plan, compiled=False), torch.no_grad():
        step(ids[:, :30], 0)
        cache.activate_past_recording()
        step(torch.cat([ids[:, 30:34], wrong[:, :5]], 1), 30)
        cache.crop(-5)
        step(ids[:, 34:40], 34)  # several forwards between two crops
        step(wrong[:, :150], 40)
        cache.crop(-150)
        logits = step(ids[:, 40:], 40)
    assert cache.get_seq_length() == 61
    torch.testing.assert_close(logits, expected[:, 40:], **TOLERANCE)


def test_a_short_sequence_allocates_few_top_k_slots():
    model = tiny("llama")
    plan = Plan.of(model, [[Pattern(2, 400, 16)] * 2] * 3, torch.randn(3, 2, LINEAR.n_features(12)))
    for tokens, slots in ((10, 128), (128, 128), (140, 256), (410, 418), (500, 418)):
        cache = feed(model, plan, torch.randint(3, 211, (1, tokens)), [tokens - 2, 1])[1]
        assert [layer.groups[0].keys.shape[2] for layer in cache.layers] == [slots] * 3


@pytest.mark.parametrize("tokens", [1, 30])
def test_a_copy_of_a_cache_is_independent(tokens):
    """As in transformers' examples of a shared prompt prefix."""
    model, plan = tiny("llama"), random_plan(tiny("llama"), 7)
    ids, other = torch.randint(3, 211, (1, 60)), torch.randint(3, 211, (1, 30))
    rests = other, ids[:, 30:]
    segments = [20] + [1] * 10 + [tokens] * (30 // tokens)
    expected = [
        reference_logits(model, plan, torch.cat([ids[:, :30], rest], 1), None, segments)[:, 30:] for rest in rests
    ]
    _, cache = feed(model, plan, ids[:, :30], [20, 1])
    copied = copy.deepcopy(cache)
    for one, rest, wanted in zip((copied, cache), rests, expected, strict=True):
        with headsink.apply(model, plan, compiled=False), torch.no_grad():
            found = [model(part, **cache_argument(one)).logits for part in rest.split(tokens, 1)]
        torch.testing.assert_close(torch.cat(found, 1), wanted, **TOLERANCE)


@pytest.mark.parametrize("freeze", [None, 30])
def test_crop_inside_the_window_needs_no_recording(freeze):
    model = tiny("llama")
    plan = Plan.uniform(model, Pattern(2, 0, 64))
    ids = torch.randint(3, 211, (1, 100))
    _, cache = feed(model, plan, ids[:, :50], [50])
    cache.crop(-20)
    if freeze:
        cache.freeze()
    with headsink.apply(model, plan, compiled=False), torch.no_grad():
        logits = torch.cat(
            [model(part, **cache_argument(cache)).logits for part in ids[:, 30:].split([1, 49, 20], 1)], 1
        )
    expected = reference_logits(model, plan, ids, None, [30, 1, 49, 20], freeze)
    torch.testing.assert_close(logits, expected[:, 30:], **TOLERANCE)


def test_crop_to_evicted_tokens_is_refused():
    model = tiny("llama")
    _, cache = feed(model, Plan.uniform(model, Pattern(2, 0, 8)), torch.randint(3, 211, (1, 50)), [50])
    with pytest.raises(HeadsinkError, match="cannot take back 3 tokens"):
        cache.crop(-3)


def test_freeze_includes_recorded_tokens_and_later_ones_can_be_cropped():
    model, plan = tiny("llama"), random_plan(tiny("llama"), 3)
    ids, cache = torch.randint(3, 211, (1, 80)), headsink.new_cache(model, plan)
    with headsink.apply(model, plan, compiled=False), torch.no_grad():
        model(ids[:, :30], **cache_argument(cache))
        cache.activate_past_recording()
        model(ids[:, 30:40], **cache_argument(cache))
        cache.freeze()
        for tokens in (20, 1, 150):
            model(torch.randint(3, 211, (1, tokens)), **cache_argument(cache))
            cache.crop(-tokens)
        logits = model(ids[:, 40:], **cache_argument(cache)).logits
    assert cache.get_seq_length() == 80
    expected = reference_logits(model, plan, ids, None, [30, *[1] * 10, 40], 40)
    torch.testing.assert_close(logits, expected[:, 40:], **TOLERANCE)


def test_reorder_repeat_and_select_rows():
    model, plan = tiny("llama"), random_plan(tiny("llama"), 2)
    ids, mask = padded()
    _, cache = feed(model, plan, ids, [61], mask)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 5]))
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    new, rows = torch.randint(3, 211, (3, 4)), [2, 0, 1]
    full, full_mask = torch.cat([ids[rows], new], 1), torch.cat([mask[rows], torch.ones_like(new)], 1)
    positions = (full_mask.cumsum(1) - 1)[:, 61:]
    with headsink.apply(model, plan, compiled=False), torch.no_grad():
        logits = model(new, **cache_argument(cache), attention_mask=full_mask, position_ids=positions).logits
    torch.testing.assert_close(logits, reference_logits(model, plan, full, full_mask, [61, 4])[:, 61:], **TOLERANCE)


# generate


GENERATE = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 16},
    "processors": {
        "do_sample": False,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[7], [9, 11]],
    },
    "end of text": {"do_sample": False, "eos_token_id": list(range(3, 40)), "pad_token_id": 0},
}


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("how", GENERATE)
def test_generate_with_an_all_full_plan_gives_the_models_tokens(family, how):
    model = tiny(family)
    ids, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 12, **GENERATE[how]}
    torch.manual_seed(1)
    expected = model.generate(ids, **options)
    with headsink.apply(model, Plan.full(model)):
        torch.manual_seed(1)
        assert torch.equal(model.generate(ids, **options), expected)
        assert model.config._attn_implementation == "headsink"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("how", GENERATE)
def test_generate_with_a_plan_equals_the_reference(how):
    """The logits that `generate` returns equal those of the reference on its output."""
    model, plan = tiny("llama"), random_plan(tiny("llama"), 4)
    ids, mask = padded()
    options = {"attention_mask": mask, "max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}
    with headsink.apply(model, plan):
        result = model.generate(ids, **options, **GENERATE[how])
    assert isinstance(returned_cache(result), PlanCache)
    if how == "beams":
        return  # its logits are per beam and step; beams with their caches are tested with the full plan
    new = len(result.logits)
    full_mask = torch.cat([mask, torch.ones(3, new, dtype=mask.dtype)], 1)
    prompt = [16, 16, 16, 13] + [1] * new if how == "chunked prefill" else 61
    expected = reference_logits(model, plan, result.sequences, full_mask, prompt)[:, 60:-1]
    torch.testing.assert_close(torch.stack(result.logits, 1), expected, **TOLERANCE)


def test_each_beam_keeps_its_cache():
    """Beam search under a plan equals beam search over the reference without any cache."""
    model, plan = tiny("llama"), random_plan(tiny("llama"), 9)
    ids = torch.randint(3, 211, (2, 30))
    options = {"max_new_tokens": 10, "num_beams": 4, "do_sample": False}
    from reference import masked

    with masked(model, plan, segments=30):
        expected = model.generate(ids, use_cache=False, **options)
    with headsink.apply(model, plan):
        assert torch.equal(model.generate(ids, **options), expected)


def test_assisted_decoding_equals_greedy_under_the_plan():
    model, plan = tiny("llama"), random_plan(tiny("llama"), 6)
    ids = torch.randint(3, 40, (1, 50)).repeat(1, 2)  # repetitive, so that prompt lookup finds candidates
    with headsink.apply(model, plan):
        expected = model.generate(ids, max_new_tokens=20, do_sample=False)
        cache = headsink.new_cache(model, plan)
        options = {"prompt_lookup_num_tokens": 4, **cache_argument(cache), "do_sample": False}
        assert torch.equal(model.generate(ids, max_new_tokens=20, **options), expected)


def test_assisted_by_another_model_with_an_all_full_plan():
    model, assistant = tiny("llama", seed=1), tiny("llama", seed=2)
    ids = torch.randint(3, 211, (1, 40))
    options = {"assistant_model": assistant, "max_new_tokens": 15, "do_sample": False}
    expected = model.generate(ids, **options)
    with headsink.apply(model, Plan.full(model)):
        cache = headsink.new_cache(model, Plan.full(model))
        assert torch.equal(model.generate(ids, **cache_argument(cache), **options), expected)


def test_text_streams_and_stops_under_a_plan(smollm2):
    from transformers import TextIteratorStreamer

    model, tokenizer = smollm2
    ids = tokenizer("One, two, three, four,", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 20, "do_sample": False, "stop_strings": ["eight"], "tokenizer": tokenizer}
    expected = model.generate(ids, **options)
    assert expected.shape[1] < ids.shape[1] + 20
    with headsink.apply(model, Plan.full(model)):
        streamer = TextIteratorStreamer(tokenizer)
        assert torch.equal(model.generate(ids, streamer=streamer, **options), expected)
    assert "".join(streamer) == tokenizer.decode(expected[0])


def test_a_plain_forward_runs_under_the_plan():
    model, plan = tiny("llama"), random_plan(tiny("llama"), 1)
    ids = torch.randint(3, 211, (1, 50))
    with headsink.apply(model, plan, compiled=False), torch.no_grad():
        for use_cache in (True, False):
            logits = model(ids, use_cache=use_cache).logits
            torch.testing.assert_close(logits, reference_logits_inside(model, plan, ids), **TOLERANCE)


def reference_logits_inside(model, plan, ids):
    twin = tiny("llama")
    twin.load_state_dict(model.state_dict())
    return reference_logits(twin, plan, ids)


def test_two_threads_with_two_plans_are_independent():
    model = tiny("llama")
    plans = [Plan.full(model), random_plan(model, 1), random_plan(model, 2)]
    prompts = [torch.randint(3, 211, (1, 40 + 3 * n)) for n in range(len(plans))]

    def run(plan, ids):
        with headsink.apply(model, plan):
            return model.generate(ids, max_new_tokens=15, do_sample=False)

    expected = [run(plan, ids) for plan, ids in zip(plans, prompts, strict=True)]
    results: list[list[bool]] = [[] for _ in plans]

    def work(n):
        results[n] = [torch.equal(run(plans[n], prompts[n]), expected[n]) for _ in range(6)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[True] * 6] * len(plans)
    assert model.config._attn_implementation == "sdpa"


# refusals


def test_a_plan_for_another_model_is_refused():
    plan = Plan.full(tiny("llama"))
    with pytest.raises(HeadsinkError, match="other weights"):
        headsink.new_cache(tiny("llama", seed=1), plan)
    with pytest.raises(HeadsinkError, match="another model: architecture"), headsink.apply(tiny("mistral"), plan):
        pass
    with pytest.raises(HeadsinkError, match="another model: kv_heads"):
        headsink.new_cache(tiny("llama-mha"), plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size: 0 is not a whole number of tokens, 1 or more"),
        ({"chunk_size": -16}, "chunk_size: -16 is not a whole number of tokens, 1 or more"),
        ({"chunk_size": True}, "chunk_size: True is not a whole number of tokens, 1 or more"),
        ({"chunk_size": 16.0}, "chunk_size: 16.0 is not a whole number of tokens, 1 or more"),
        ({"prefill": "lazy"}, "prefill: 'lazy' is neither 'dense' nor 'sparse'"),
        ({"prefill": None}, "prefill: None is neither 'dense' nor 'sparse'"),
        (
            {"prefill": "sparse", "chunk_size": 16},
            "chunk_size: sparse prefill evicts at every token; leave chunk_size out",
        ),
    ],
    ids=str,
)
def test_invalid_options_of_prefill_are_refused(options, message):
    model = tiny("llama")
    plan = Plan.full(model)
    for call in (headsink.new_cache, lambda *given, **options: headsink.apply(*given, **options).__enter__()):
        with pytest.raises(HeadsinkError) as error:
            call(model, plan, **options)
        assert str(error.value) == message
    assert model.config._attn_implementation == "sdpa"


def test_the_fingerprint_is_the_same_in_bfloat16():
    plan = Plan.full(tiny("llama"))
    assert headsink.new_cache(tiny("llama", dtype=torch.bfloat16), plan) is not None


def test_caches_incompatible_with_the_plan_are_refused():
    model, ids = tiny("llama"), torch.randint(3, 211, (1, 20))
    plan, used = Plan.full(model), DynamicCache(config=model.config)
    model(ids, **cache_argument(used))
    with headsink.apply(model, plan):
        with pytest.raises(HeadsinkError, match="filled without the plan"):
            model(ids, **cache_argument(used))
        with pytest.raises(HeadsinkError, match="StaticCache cannot hold a plan"):
            model(ids, **cache_argument(StaticCache(config=model.config, max_cache_len=64)))
    with pytest.raises(HeadsinkError, match=r"inside `with headsink.apply"):
        model(ids, **cache_argument(headsink.new_cache(model, plan)))


def test_padding_that_changes_midway_is_refused():
    model, (ids, mask) = tiny("llama"), padded()
    _, cache = feed(model, Plan.full(model), ids, [61], mask)
    other = torch.cat([mask.roll(1, 0), mask[:, -1:]], 1)
    with headsink.apply(model, Plan.full(model)), pytest.raises(HeadsinkError, match="not the one that this cache"):
        model(ids[:, :1], **cache_argument(cache), attention_mask=other)


@pytest.mark.parametrize(
    ("mask", "message"),
    [([[1, 0, 1, 1]], "gaps"), ([[[[1, 1, 1, 1]] * 4]], "2-D attention mask")],
)
def test_unsupported_masks_are_refused(mask, message):
    model = tiny("llama")
    with headsink.apply(model, Plan.full(model)), pytest.raises(HeadsinkError, match=message):
        model(torch.randint(3, 211, (1, 4)), attention_mask=torch.tensor(mask).bool())


@torch.no_grad()
def test_a_text_beyond_the_verified_length_warns_once(recwarn):
    model, ids = tiny("llama"), torch.randint(3, 211, (2, 40))
    plan = random_plan(model, 0)
    verified = plan.model_copy(update={"quality": (Quality(**{**QUALITY, "context": 40}),)})
    with headsink.apply(model, plan):
        model(torch.cat([ids, ids], 1))
    with headsink.apply(model, verified):
        cache = returned_cache(model(ids))
        assert not recwarn.list
        with pytest.warns(UserWarning, match="a text has 41 tokens, the plan's quality was measured up to 40"):
            model(ids[:, :1], **cache_argument(cache))
        model(ids[:, :1], **cache_argument(cache))
        model(torch.cat([ids, ids], 1))
    assert not recwarn.list
    with headsink.apply(model, verified), pytest.warns(UserWarning, match="has 80 tokens"):
        model(inputs_embeds=model.get_input_embeddings()(torch.cat([ids, ids], 1)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plan", "full", "endless"])
def test_200_calls_leak_nothing(kind):
    """No tensor and no other Python object is leaked, from the twentieth call on."""
    model = tiny("llama")
    plan = {
        "plan": random_plan(model, 3),
        "full": Plan.full(model),
        "endless": Plan.uniform(model, Pattern(2, 0, 9), positions="cache-relative"),
    }[kind]
    ids, sizes = torch.randint(3, 211, (1, 30)), []
    for number in range(200):
        with headsink.apply(model, plan):
            model.generate(ids, max_new_tokens=4, do_sample=False)
        if number in (19, 199):
            gc.collect()
            tensors = [
                x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)
            ]  # without proxies of deleted objects
            sizes.append((len(tensors), sum(t.untyped_storage().nbytes() for t in tensors), len(gc.get_objects())))
    assert sizes[1][0] <= sizes[0][0]
    assert sizes[1][1] <= sizes[0][1]
    assert sizes[1][2] - sizes[0][2] < 200
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize("calls", [[60], [7, 1, 30, 1, 21], [1] * 60])
def test_layers_with_a_sliding_window_hold_no_more_than_it(calls):
    model, plan = tiny("gemma3"), random_plan(tiny("gemma3"), 1)
    cache, ids = headsink.new_cache(model, plan), torch.randint(3, 211, (1, 60))
    own = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = torch.cat([model(part, **cache_argument(own)).logits for part in ids.split(calls, 1)], 1)
        full = headsink.new_cache(model, Plan.full(model))
        with headsink.apply(model, Plan.full(model)):
            found = torch.cat([model(part, **cache_argument(full)).logits for part in ids.split(calls, 1)], 1)
        with headsink.apply(model, plan):
            for part in ids.split(calls, 1):
                model(part, **cache_argument(cache))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for one in (cache, full):
        (group,) = one.layers[0].groups
        assert group.keys.shape[2] == 11


def test_a_mask_of_another_window_than_the_layers_is_refused():
    model, plan = tiny("gemma3"), Plan.full(tiny("gemma3"))
    cache, ids = headsink.new_cache(model, plan), torch.randint(3, 211, (1, 20))
    model.config.sliding_window = 5
    said = r"a layer with a window of 11 in the configuration got a mask of a window of 5"
    with pytest.raises(HeadsinkError, match=said), headsink.apply(model, plan, compiled=False), torch.no_grad():
        model(ids, **cache_argument(cache))

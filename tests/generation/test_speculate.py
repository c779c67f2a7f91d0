"""Lossless mode: greedy text equals the full cache's, sampled text has its distribution."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import FAMILIES, tiny
from feeding import padded
from plans import random_plan
from transformers.generation.streamers import BaseStreamer

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.generation.acceptance import AGAIN, FIRST, MOST, DraftLength
from headsink.generation.lossless import generate_lossless
from headsink.generation.sequences import Speculation
from headsink.models.transformers_names import cache_argument

NEW = 24


class Streamed(BaseStreamer):
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


def own(model, ids, **options):
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False} | options)


def lossless(model, plan, ids, **options):
    return generate_lossless(model, plan, ids, **{"max_new_tokens": NEW, "do_sample": False} | options)


@pytest.mark.slow
@pytest.mark.parametrize("drafted", [0, 1, 3, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_the_models(family, drafted, case_seed):
    # In float64 transformers' eager attention of Gemma 2 makes NaN of padding.
    model = tiny(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    plan, (ids, mask), speculation = random_plan(model, case_seed), padded(), Speculation()
    found = lossless(model, plan, ids, attention_mask=mask, draft_tokens=drafted, speculation=speculation)
    assert torch.equal(found, own(model, ids, attention_mask=mask))
    assert speculation.kv_bytes > 0
    for one in (ids[:1], ids[:1, :1]):
        assert torch.equal(lossless(model, plan, one, draft_tokens=drafted), own(model, one))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_draft_of_an_all_full_plan_is_always_accepted(family):
    model, speculation = tiny(family, dtype=torch.float64), Speculation()
    ids, _ = padded()
    lossless(model, Plan.full(model), ids, draft_tokens=3, speculation=speculation)
    assert speculation.acceptance == 1
    assert speculation.passes == NEW // 4
    lossless(model, Plan.uniform(model, Pattern(0, 0, 1)), ids, draft_tokens=3, speculation=speculation)
    assert speculation.acceptance < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": list(range(3, 40)), "pad_token_id": 0},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"max_length": 70, "max_new_tokens": None},
    ],
)
def test_options_of_generate_are_kept(options):
    model = tiny("llama", dtype=torch.float64)
    ids, mask = padded()
    for seed in range(3):
        found = lossless(model, random_plan(model, seed), ids, attention_mask=mask, draft_tokens=3, **options)
        assert torch.equal(found, own(model, ids, attention_mask=mask, **options))


@pytest.mark.slow
@pytest.mark.parametrize("drafted", [1, 2])
def test_samples_have_the_models_distribution(drafted):
    """All 27 continuations of three tokens, each with three choices, against the model's probabilities."""
    model, kept = tiny("llama", dtype=torch.float64), 3
    for parameter in model.parameters():  # so that no token has probability near 1
        parameter.data *= 0.8
    plan, ids, rows = Plan.uniform(model, Pattern(2, 0, 14)), torch.randint(3, 211, (1, 20)), 3000
    speculation, options = Speculation(), {"top_k": kept, "temperature": 2.0, "do_sample": True, "max_new_tokens": 3}
    found = generate_lossless(
        model, plan, ids.repeat(rows, 1), draft_tokens=drafted, speculation=speculation, **options
    )[:, 20:]
    assert 0.1 < speculation.acceptance < 0.95
    chances = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, chance in chances.items():
            with torch.no_grad():
                logits = model(torch.cat([ids, torch.tensor([text], dtype=torch.long)], 1)).logits[0, -1]
            top = (logits / 2).topk(kept)
            for token, share in zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True):
                longer[*text, token] = chance * share
        chances = longer
    counts = Counter(map(tuple, found.tolist()))
    assert set(counts) <= set(chances)
    expected = torch.tensor(list(chances.values()), dtype=torch.float64) * rows
    squares = (torch.tensor([counts[text] for text in chances]) - expected) ** 2 / expected.clamp(min=1)
    assert float(squares.sum()) < 65  # chi-squared with 26 degrees of freedom: exceeded once in 30,000


def test_with_a_returned_cache_and_several_sequences_per_prompt():
    model, (ids, mask) = tiny("llama", dtype=torch.float64), padded()
    plan = random_plan(model, 1)
    assert torch.equal(lossless(model, plan, ids[:1], use_cache=True), own(model, ids[:1]))
    options = {"attention_mask": mask, "num_return_sequences": 2, "do_sample": True, "top_k": 1}
    assert torch.equal(lossless(model, plan, ids, **options), own(model, ids, **options))


def test_a_batch_without_a_padding_token_ends_like_the_models():
    model, (ids, mask) = tiny("llama", dtype=torch.float64), padded()
    options = {"attention_mask": mask, "eos_token_id": list(range(3, 60)), "pad_token_id": None}
    model.generation_config.pad_token_id = None
    assert torch.equal(lossless(model, random_plan(model, 1), ids, **options), own(model, ids, **options))


@pytest.mark.slow
def test_under_autocast_in_inference_mode_and_in_a_thread_next_to_a_plan():
    model, (ids, mask) = tiny("llama"), padded()
    plan, options = random_plan(model, 1), {"attention_mask": mask}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lossless(model, plan, ids, **options), own(model, ids, **options))
    expected = own(model, ids, **options)
    with torch.inference_mode():
        assert torch.equal(lossless(model, plan, ids, **options), expected)
    with headsink.apply(model, random_plan(model, 2)), ThreadPoolExecutor(2) as pool:
        under = own(model, ids, **options)
        both = pool.submit(lossless, model, plan, ids, **options), pool.submit(own, model, ids, **options)
        assert torch.equal(both[0].result(), expected)
        assert torch.equal(both[1].result(), under)
    assert not torch.equal(under, expected)


def test_the_draft_length_is_adapted_to_measured_times():
    pace = DraftLength()
    for _ in range(FIRST):
        assert pace.choose() == 0
        pace.update(0, 0.0, 1.0, 0.0)
    assert pace.choose() == 3
    # A draft costs a tenth of a pass, all tokens are accepted, and verifying more is free.
    pace.update(3, 0.3, 1.0, 3.0)
    for _ in range(50):
        pace.update(8, 0.8, 1.0, 8.0)
    assert pace.choose() == MOST
    for _ in range(50):
        pace.update(8, 0.8, 1.0, 0.0)  # none is accepted
    assert pace.choose() == 0
    for again in (AGAIN, 2 * AGAIN, 4 * AGAIN):
        for _ in range(again):
            assert pace.choose() == 0
            pace.update(0, 0.0, 1.0, 0.0)
        assert pace.choose() == 1  # to measure the acceptance again, less and less often
        pace.update(1, 0.1, 1.0, 0.0)
    slow = DraftLength()
    for _ in range(FIRST):
        slow.update(0, 0.0, 1.0, 0.0)
    slow.update(3, 2.7, 2.0, 3.0)  # a draft costs as much as a pass
    assert slow.choose() == 0


@pytest.mark.slow
def test_text_streams_and_stops(smollm2):
    model, tokenizer = smollm2
    plan, ids = (
        Plan.uniform(model, Pattern(4, 0, 64)),
        tokenizer("One, two, three, four,", return_tensors="pt")["input_ids"],
    )
    streamed = Streamed()
    found = lossless(model, plan, ids, draft_tokens=4, streamer=streamed)
    assert torch.equal(found, own(model, ids))
    assert streamed.ids == found[0].tolist()
    assert streamed.ended
    stopped = {"stop_strings": ["eight"], "tokenizer": tokenizer}
    assert torch.equal(lossless(model, plan, ids, **stopped), own(model, ids, **stopped))
    assert lossless(model, plan, ids, **stopped).shape[1] < found.shape[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"assistant_model": tiny("llama")}, "assisted generation"),
        ({"inputs_embeds": torch.zeros(1, 3, 48)}, "inputs_embeds"),
        ({"use_cache": False}, "leave out use_cache=False"),
        ({"return_dict_in_generate": True}, "return_dict"),
        ({**cache_argument(1)}, "leave out the cache and custom_generate"),
        ({"draft_tokens": 9}, "draft_tokens: 9 is outside 0 to 8"),
        ({"stop_strings": ["x"]}, "stop_strings: they need tokenizer"),
    ],
)
def test_unsupported_options_of_lossless_are_refused(options, said):
    model = tiny("llama")
    with pytest.raises(HeadsinkError, match=said):
        lossless(model, Plan.full(model), torch.tensor([[5, 6, 7]]), **options)
    with pytest.raises(HeadsinkError, match="positions:"):
        lossless(model, Plan.uniform(model, Pattern(1, 0, 4), positions="cache-relative"), torch.tensor([[5, 6, 7]]))
    with pytest.raises(HeadsinkError, match="another model"):
        headsink.generate_lossless(model, Plan.full(tiny("qwen2")), torch.tensor([[5, 6, 7]]))

"""Generation under plans for prefill compression."""

import pytest
import torch
from families import tiny
from plans import random_plan
from reference import reference_logits
from transformers import DynamicCache

import headsink
from headsink import HeadsinkError
from headsink.generation.chat import Conversation
from headsink.generation.generate import generate
from headsink.generation.templates import MARK, document_prompt, encode
from headsink.models.transformers_names import cache_argument


def is_greedy(model, plan, ids, answer, freeze):
    """Return whether the answer at the end of `ids` is the reference's greedy one, without eviction from column `freeze` on."""
    logits = reference_logits(model, plan, torch.tensor([ids]), freeze=freeze, prefill_compression=freeze is not None)[
        0, -len(answer) - 1 : -1
    ]
    return logits.argmax(-1).tolist() == answer


@pytest.mark.parametrize("tokens", [1, 2, 50])
@pytest.mark.parametrize("freeze", [False, True])
def test_prefill_compression_covers_all_but_the_last_prompt_token(tokenizer, tokens, freeze):
    model = tiny("llama", dtype=torch.float64)
    plan = random_plan(model, 4).model_copy(update={"prefill_compression": freeze})
    ids = torch.randint(3, 211, (tokens,)).tolist()
    done = generate(model, tokenizer, ids, plan, max_new_tokens=30)
    assert done.prompt_tokens == tokens
    assert len(done.ids) == 30
    assert is_greedy(model, plan, ids + done.ids, done.ids, tokens - 1 if freeze else None)


def test_a_prompt_is_reconstructed(tokenizer):
    model = tiny("llama", dtype=torch.float64)
    plan = random_plan(model, 4).model_copy(update={"prefill_compression": True, "reconstruction_prompt": (7, 8, 9)})
    ids = torch.randint(3, 211, (50,)).tolist()
    done = generate(model, tokenizer, ids, plan, max_new_tokens=12)
    before, full = torch.tensor([ids[:-1]]), DynamicCache(config=model.config)
    with torch.no_grad():
        model(before, **cache_argument(full))
    cache = headsink.compress(model, plan, full, input_ids=before)
    with headsink.apply(model, plan), torch.no_grad():
        logits = model(torch.tensor([ids[-1:] + done.ids[:-1]]), **cache_argument(cache)).logits
    assert logits[0].argmax(-1).tolist() == done.ids
    other = generate(model, tokenizer, ids, plan.model_copy(update={"reconstruction_prompt": ()}), max_new_tokens=12)
    assert other.ids != done.ids


def test_the_first_prompt_of_a_conversation_is_compressed(tiny_folder):
    model, tokenizer = headsink.load(tiny_folder, device="cpu", dtype="float32")
    plan = random_plan(model, 4).model_copy(update={"prefill_compression": True})
    talk = Conversation(model, tokenizer, plan, max_new_tokens=8)
    first = talk.ask("What is in the box? " * 20)
    cache = talk.cache
    second = talk.ask("And what else?")
    assert talk.cache is cache
    assert is_greedy(model, plan, talk.ids, second.ids, first.prompt_tokens - 1)


def test_lossless_generation_equals_the_model(tiny_folder):
    model, tokenizer = headsink.load(tiny_folder, device="cpu", dtype="float32")
    plan, ids = random_plan(model, 4), tokenizer("What is in the box? " * 20)["input_ids"]
    own = generate(model, tokenizer, ids, max_new_tokens=12)
    done = generate(model, tokenizer, ids, plan, max_new_tokens=12, lossless=True)
    assert done.ids == own.ids
    assert len(done.steps_s) == 11
    assert done.acceptance is None or 0 <= done.acceptance <= 1
    assert done.kv_bytes > own.kv_bytes  # both caches
    with pytest.raises(HeadsinkError, match="lossless: give a plan for the draft"):
        generate(model, tokenizer, ids, max_new_tokens=12, lossless=True)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_long_conversation_is_read_in_chunks_and_only_once(tiny_folder, compiled, monkeypatch):
    monkeypatch.setattr("headsink.runtime.prefill.CHUNK", 16)
    model, tokenizer = headsink.load(tiny_folder, device="cpu", dtype="float32")
    plan = random_plan(model, 4)
    talk = Conversation(model, tokenizer, plan, max_new_tokens=8, compiled=compiled)
    for question in ("What is in the box? " * 9, "And what else is there? " * 9):
        answer = talk.ask(question)
        assert talk.cache.get_seq_length() == len(talk.ids) - 1
        assert is_greedy(model, plan, talk.ids, answer.ids, None)


def test_ctrl_c_restores_a_conversation(tiny_folder):
    model, tokenizer = headsink.load(tiny_folder, device="cpu", dtype="float32")
    plan = random_plan(model, 4)
    talk, calls = Conversation(model, tokenizer, plan, max_new_tokens=8), []

    def interrupt(text):
        calls.append(text)
        raise KeyboardInterrupt

    talk.ask("What is in the box?")
    said = list(talk.messages)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("And what else?", show=interrupt)
    assert calls
    assert talk.messages == said
    assert model.config._attn_implementation == "sdpa"
    answer = talk.ask("And what else?")
    assert is_greedy(model, plan, talk.ids, answer.ids, None)
    assert len(talk.messages) == 4


def test_a_cache_that_a_prompt_cannot_continue_is_refused(tokenizer):
    model = tiny("llama")
    plan, ids = random_plan(model, 4), torch.randint(3, 211, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for rows, given, said in (
        (slice(2), {}, "cache: it holds 2 sequences; give the cache of one"),
        (
            slice(1),
            {"attention_mask": mask[:1], "position_ids": (mask[:1].cumsum(1) - 1).clamp(min=0)},
            "a padded batch",
        ),
    ):
        cache = headsink.new_cache(model, plan)
        with headsink.apply(model, plan), torch.no_grad():
            model(ids[rows], **cache_argument(cache), **given)
        with pytest.raises(HeadsinkError, match=said):
            generate(model, tokenizer, [*ids[0].tolist(), 7], plan, cache=cache, max_new_tokens=2)


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(HeadsinkError, match=r"prompt: character 4 is U\+D83D, half of a character"):
        encode(tokenizer, "hi \ud83d!")
    assert encode(tokenizer, "hi \N{GRINNING FACE}!") == tokenizer("hi \N{GRINNING FACE}!")["input_ids"]


def test_a_document_may_contain_the_end_marker(tiny_folder):
    _, tokenizer = headsink.load(tiny_folder, device="cpu", dtype="float32")
    text, _ = document_prompt(tokenizer, f"before {MARK} after")
    assert text.endswith(f"before {MARK} after")

"""Generation and conversations under plans."""

from functools import partial

import pytest
import torch
from families import tiny
from plans import random_plan
from reference import reference_logits

import headsink
from headsink import HeadsinkError
from headsink.generation.chat import Conversation
from headsink.generation.generate import generate
from headsink.generation.templates import MARK, chat_prompt, document_prompt, encode
from headsink.models.transformers_names import cache_argument


def is_greedy(model, plan, ids, answer, segments):
    """Return whether the answer at the end of `ids` is the reference's greedy one. segments: as for `reference_logits`."""
    logits = reference_logits(model, plan, torch.tensor([ids]), None, segments)[0, -len(answer) - 1 : -1]
    return logits.argmax(-1).tolist() == answer


def turns(*answers):
    """Return the segments of a conversation: the new tokens of each prompt, and the single tokens of each answer.

    answers: what `ask` returned. The last token of an answer is read with the next prompt.
    """
    segments = []
    for answer in answers:
        segments += [answer.prompt_tokens - sum(segments), *[1] * (len(answer.ids) - 1)]
    return [*segments, 1]


@pytest.mark.parametrize("tokens", [1, 2, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_prompt_is_one_segment_and_every_new_token_another(tokenizer, tokens, dtype):
    model = tiny("llama", dtype=dtype)
    plan = random_plan(model, 4)
    ids = torch.randint(3, 211, (tokens,)).tolist()
    done = generate(model, tokenizer, ids, plan, max_new_tokens=30)
    assert done.prompt_tokens == tokens
    assert len(done.ids) == 30
    assert is_greedy(tiny("llama", dtype=torch.float64), plan, ids + done.ids, done.ids, tokens)


def test_a_prompt_is_reconstructed(tokenizer):
    model = tiny("llama", dtype=torch.float64)
    plan = random_plan(model, 4).model_copy(update={"reconstruction_prompt": (7, 8, 9)})
    ids = torch.randint(3, 211, (50,)).tolist()
    done = generate(model, tokenizer, ids, plan, max_new_tokens=12, reconstruct=True)
    cache = headsink.compress(model, plan, torch.tensor([ids[:-1]]), reconstruct=True)
    with headsink.apply(model, plan), torch.no_grad():
        for token, expected in zip(ids[-1:] + done.ids[:-1], done.ids, strict=True):
            assert int(model(torch.tensor([[token]]), **cache_argument(cache)).logits.argmax()) == expected
    assert generate(model, tokenizer, ids, plan, max_new_tokens=12).ids != done.ids


@pytest.mark.parametrize("question", ["And what else?", "And what else is there? " * 20], ids=["short", "long"])
def test_every_prompt_of_a_conversation_is_one_segment(tiny_folder, question):
    model, tokenizer = headsink.load(tiny_folder, device="cpu", dtype="float32")
    plan = random_plan(model, 4)
    talk = Conversation(model, tokenizer, plan, max_new_tokens=8)
    first = talk.ask("What is in the box? " * 20)
    cache = talk.cache
    second = talk.ask(question)
    assert talk.cache is cache
    assert is_greedy(model, plan, talk.ids, second.ids, turns(first, second))


def test_lossless_generation_equals_the_model(tiny_folder):
    model, tokenizer = headsink.load(tiny_folder, device="cpu", dtype="float32")
    plan, ids = random_plan(model, 4), tokenizer("What is in the box? " * 20)["input_ids"]
    own = generate(model, tokenizer, ids, max_new_tokens=12)
    done = generate(model, tokenizer, ids, plan, max_new_tokens=12, lossless=True)
    assert done.ids == own.ids
    assert len(done.steps_s) == 11
    assert done.acceptance is None or 0 <= done.acceptance <= 1
    assert done.kv_bytes > own.kv_bytes  # both caches
    assert generate(model, tokenizer, ids, max_new_tokens=12, lossless=True).ids == own.ids  # drafts come from the text
    with pytest.raises(HeadsinkError, match="lossless: the cache of a plan drafts here; give a plan"):
        generate(model, tokenizer, ids, max_new_tokens=12, lossless=True, draft_tokens=2)


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_long_conversation_is_read_only_once_and_in_chunks_if_sparsely(tiny_folder, compiled, prefill, monkeypatch):
    monkeypatch.setattr("headsink.runtime.prefill.CHUNK", 16)
    model, tokenizer = headsink.load(tiny_folder, device="cpu", dtype="float32")
    plan = random_plan(model, 4)
    talk, read = Conversation(model, tokenizer, plan, max_new_tokens=8, compiled=compiled), []
    new_cache = partial(headsink.new_cache, model, plan, not compiled, prefill=prefill)
    monkeypatch.setattr(talk, "_empty_cache", new_cache)
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, output: read.append(given[0].shape[1]))
    answers = []
    for question in ("What is in the box? " * 9, "And what else is there? " * 9):
        answers.append(talk.ask(question))
        assert talk.cache.get_seq_length() == len(talk.ids) - 1
    hook.remove()
    segments = turns(*answers) if prefill == "dense" else [1] * len(talk.ids)
    assert is_greedy(model, plan, talk.ids, answers[-1].ids, segments)
    if compiled:
        return  # the comparison before its first use calls the embedding too
    assert sum(read) == len(talk.ids) - 1
    assert (max(read) <= 16) == (prefill == "sparse")


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
    assert is_greedy(model, plan, talk.ids, answer.ids, turns(answer))  # read again from the start
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


def test_a_document_is_a_prefix_of_every_chat_that_begins_with_it(tiny_folder):
    """So that a server finds it (serving/vllm/prefixes.py), however the document ends."""
    _, tokenizer = headsink.load(tiny_folder, device="cpu", dtype="float32")
    for end in ("", "\n", "\n\n", "  \n \n"):
        _, ids = document_prompt(tokenizer, f"The gate is 47.{end}")
        for question in (f"{end}\n\nWhich gate?", "\n\nWhich gate?"):
            text = chat_prompt(tokenizer, [{"role": "user", "content": f"The gate is 47.{question}"}])
            assert encode(tokenizer, text)[: len(ids)] == ids


def test_a_document_may_contain_the_end_marker(tiny_folder):
    _, tokenizer = headsink.load(tiny_folder, device="cpu", dtype="float32")
    text, _ = document_prompt(tokenizer, f"before {MARK} after")
    assert text.endswith(f"before {MARK} after")

"""Continuations of a document: models with recurrent layers, and keys in any memory layout."""

import pytest
import torch
from architectures import close, make, tokens

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.cache.cache import nbytes
from headsink.calibration.cached_document import CachedDocument
from headsink.compression import continuations
from headsink.compression.continuations import Continuations
from headsink.data.documents import Document, Question
from headsink.runtime.scoring import continuation_log_probs
from headsink.runtime.scoring import read as read_cache
from headsink.utils import flash

RECURRENT = ("Granite 4", "LFM2", "Qwen3-Next", "Qwen3.5")
LENGTH = 90


def document():
    ids = tokens(LENGTH + 60, seed=3)[0].tolist()
    questions = [Question("one", ids[LENGTH + 40 : LENGTH + 57], 4), Question("two", ids[:5], 1)]
    return Document(ids[:LENGTH], ids[LENGTH : LENGTH + 40], questions)


def own_log_probs(model, ids, scored):
    return model(torch.tensor([ids]), use_cache=False).logits[0, -scored - 1 : -1].log_softmax(-1)


def test_a_batch_of_continuations_is_joined_again():
    made = Continuations([[1, 2, 3], [4], [5, 6]], 10, torch.device("cpu"))
    assert made.batch(made.ids).tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert made.batch(made.positions).tolist() == [[10, 11, 12], [10, 0, 0], [10, 11, 0]]
    heads = torch.randn(2, 5, 6)
    assert torch.equal(made.join(made.batch(heads)), heads)


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_continuations_of_a_recurrent_model_have_its_own_log_probs(name, monkeypatch):
    monkeypatch.setattr(continuations, "STORED", {})  # without rounding keys to bfloat16
    model, given = make(name), document()
    cached = CachedDocument(model, given)
    parts = [(ids, scored) for _, ids, scored in given.continuations]
    expected = torch.cat([own_log_probs(model, given.ids + ids, scored) for ids, scored in parts])
    for _ in range(2):  # the states of the document are not changed
        close(cached.log_probs(cached.full_patterns()), expected)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_scored_continuation_is_taken_back_from_recurrent_layers(name):
    model, given = make(name), document()
    for plan in (None, Plan.full(model)):
        cache = read_cache(model, plan, given.ids)
        for _, ids, scored in (*given.continuations, *given.continuations):
            close(continuation_log_probs(model, cache, ids, scored), own_log_probs(model, given.ids + ids, scored))


def test_models_that_do_not_continue_their_states_are_refused():
    with pytest.raises(HeadsinkError, match=r"JambaForCausalLM gives other logits in two calls than in one"):
        CachedDocument(make("Jamba"), document())


@pytest.mark.parametrize("name", RECURRENT)
def test_the_size_of_a_cache_has_recurrent_states(name):
    model = make(name)
    cache = headsink.compress(model, Plan.uniform(model, Pattern(2, 0, 8)), tokens(LENGTH))
    states = [layer for layer in cache.layers if hasattr(layer, "conv_states")]
    held = [t for layer in states for of in (layer.conv_states, layer.recurrent_states) for t in of.values()]
    size = sum(t.untyped_storage().nbytes() for t in held if t is not None)
    assert states
    assert size
    attention = [layer for layer in cache.layers if not hasattr(layer, "conv_states")]
    cache.layers = attention
    without = nbytes(cache)
    cache.layers = states + attention
    assert nbytes(cache) == without + size


def test_the_flash_kernel_reads_any_layout():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 30, 16, generator=generator) for heads in (4, 2, 2))
    with torch.no_grad():
        expected = flash.attend(query, key, value, 0.25)
        found = flash.attend(*(t.mT.contiguous().mT for t in (query, key, value)), 0.25)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)

"""Kernels use raw addresses, so all their assumptions are checked before a call, with an error if one fails."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from families import tiny

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.attention.backends import backend_of
from headsink.attention.cpu.backend import attend_table
from headsink.attention.kv_table import KVField
from headsink.attention.params import AttentionParams
from headsink.attention.visibility import KeyVisibility
from headsink.cache.kv_table import KVTable
from headsink.decoding.step import decoder, open_decoder
from headsink.eviction.lifetimes import lifetimes
from headsink.models.transformers_names import cache_argument

FLAGS = torch.ones(2, 3, 5, dtype=torch.bool)
FEW = {
    "query": torch.randn(2, 6, 1, 8),
    "keys": torch.randn(2, 3, 5, 8),
    "values": torch.randn(2, 3, 5, 8),
    "visible": FLAGS,
    "end": 5,
    "params": AttentionParams(1.0),
}
WRONG_FEW = {
    "another batch": {"query": torch.randn(3, 6, 1, 8)},
    "heads that cannot be shared": {"query": torch.randn(2, 7, 1, 8)},
    "another head size": {"query": torch.randn(2, 6, 1, 16)},
    "another dtype": {"query": torch.randn(2, 6, 1, 8).bfloat16()},
    "narrow keys": {"keys": torch.randn(2, 3, 5, 8).bfloat16()},
    "narrow values": {"values": torch.randn(2, 3, 5, 8).bfloat16()},
    "fewer values": {"values": torch.randn(2, 3, 4, 8)},
    "shorter values": {"values": torch.randn(2, 3, 5, 4)},
    "fewer flags": {"visible": FLAGS[:, :, :4]},
    "wide flags": {"visible": FLAGS.long()},
    "more slots than there are": {"end": 6},
    "slots before the first": {"end": -1},
}
UNTIL = torch.full((6, 5), 9)
TILES = {
    "query": torch.randn(2, 6, 4, 8),
    "keys": torch.randn(6, 5, 8),
    "values": torch.randn(6, 5, 8),
    "visibility": KeyVisibility(UNTIL, 1, 0, 0, None, False, 0, 0),
    "params": AttentionParams(1.0),
}
WRONG_TILES = {
    "another batch": {"query": torch.randn(4, 6, 4, 8)},
    "heads that cannot be shared": {"query": torch.randn(2, 7, 4, 8)},
    "another head size": {"query": torch.randn(2, 6, 4, 4)},
    "another dtype": {"query": torch.randn(2, 6, 4, 8).bfloat16()},
    "narrow keys": {"keys": torch.randn(6, 5, 8).bfloat16()},
    "fewer values": {"values": torch.randn(6, 4, 8)},
    "fewer ends": {"visibility": KeyVisibility(UNTIL[:, :4], 1, 0, 0, None, False, 0, 0)},
    "ends of fewer heads": {"visibility": KeyVisibility(UNTIL[:3], 1, 0, 0, None, False, 0, 0)},
    "more prefix slots than keys": {"visibility": KeyVisibility(UNTIL, 1, 6, 0, None, False, 0, 0)},
}


def decode(**given):
    return backend_of(given["query"].device.type).decode(**given)


def prefill(**given):
    return backend_of(given["query"].device.type).prefill(**given)


def put(given, wrong, device):
    """Return arguments on a device, some of them replaced by wrong ones."""

    def there(one):
        if isinstance(one, KeyVisibility):
            return dataclasses.replace(one, until=one.until.to(device))
        return one.to(device) if isinstance(one, torch.Tensor) else one

    return {name: there(one) for name, one in (given | wrong).items()}


@pytest.mark.parametrize("wrong", WRONG_FEW)
def test_buffers_of_another_shape_are_refused(wrong):
    with pytest.raises(HeadsinkError, match=r"^attention: "):
        decode(**FEW | WRONG_FEW[wrong])


@pytest.mark.parametrize("wrong", WRONG_TILES)
def test_tiles_of_another_shape_are_refused(wrong):
    with pytest.raises(HeadsinkError, match=r"^attention: "):
        prefill(**TILES | WRONG_TILES[wrong])


@pytest.mark.parametrize("wrong", WRONG_FEW)
def test_buffers_of_another_shape_are_refused_on_a_gpu(device, wrong):
    with pytest.raises(HeadsinkError, match=r"^attention: "):
        decode(**put(FEW, WRONG_FEW[wrong], device))


@pytest.mark.parametrize("wrong", WRONG_TILES)
def test_tiles_of_another_shape_are_refused_on_a_gpu(device, wrong):
    with pytest.raises(HeadsinkError, match=r"^attention: "):
        prefill(**put(TILES, WRONG_TILES[wrong], device))


def test_valid_arguments_are_accepted(device):
    assert decode(**put(FEW, {}, device)).shape == (2, 6, 1, 8)
    assert prefill(**put(TILES, {}, device)).shape == (2, 6, 4, 8)


def test_non_contiguous_tensors_are_copied():
    odd = {
        name: FEW[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("query", "keys", "values", "visible")
    }
    assert not odd["keys"].is_contiguous()
    torch.testing.assert_close(decode(**FEW | odd), decode(**FEW))
    odd = {name: TILES[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("query", "keys", "values")}
    torch.testing.assert_close(prefill(**TILES | odd), prefill(**TILES))


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_table_of_other_rows_is_refused(rows):
    table = np.zeros((4, len(KVField)), np.int64)  # two rows of two KV heads
    new = torch.randn(rows, 2, 1, 8)
    with pytest.raises(HeadsinkError, match=r"^attention: "):
        attend_table(table, torch.float32, torch.randn(rows, 4, 1, 8), 1, 1.0, new, new)


@pytest.mark.parametrize(
    "new",
    [torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 8).bfloat16(), torch.randn(2, 2, 2, 8), torch.randn(2, 1, 1, 8)],
    ids=["head size", "dtype", "tokens", "heads"],
)
def test_a_new_token_of_another_shape_is_refused(new):
    table = np.zeros((4, len(KVField)), np.int64)
    with pytest.raises(HeadsinkError, match=r"^attention: a new token"):
        attend_table(table, torch.float32, torch.randn(2, 4, 1, 8), 1, 1.0, new, new)


def test_scores_of_other_rows_are_refused():
    with pytest.raises(HeadsinkError, match=r"^lifetimes: "):
        lifetimes(torch.randn(2, 3), torch.randn(3, 9), 2)


def model_and_cache(rows=1, tokens=30, kind=torch.float32, family="llama", **options):
    model = tiny(family).to(kind)
    heads = model.config.num_key_value_heads
    patterns = [[Pattern(1, 2, 4), Pattern(), *[Pattern(2, 0, 3)] * (heads - 2)]] * model.config.num_hidden_layers
    plan = Plan.of(model, patterns, torch.randn(len(patterns), heads, 30))
    cache, ids = headsink.new_cache(model, plan), torch.randint(3, 211, (rows, tokens))
    with headsink.apply(model, plan), torch.no_grad():
        model(ids, **cache_argument(cache))
    return model, plan, cache


DAMAGE = {
    "keys of another dtype": lambda g: {"keys": g.keys.bfloat16()},
    "values of another dtype": lambda g: {"values": g.values.double()},
    "values of another head size": lambda g: {"values": g.values[..., :6].contiguous()},
    "fewer flags": lambda g: {"visible": g.visible[:, :, :3].contiguous()},
    "flags of eight bytes": lambda g: {"visible": g.visible.long()},
    "fewer rows": lambda g: {"keys": g.keys[:1]},
    "keys side by side": lambda g: {"keys": g.keys.transpose(2, 3).contiguous().transpose(2, 3)},
    "narrow scores": lambda g: {"scores": g.scores.half()},
    "wide scores": lambda g: {"scores": g.scores.double()},
    "no weights": lambda g: {"weights": g.weights[:0]},
    "weights of another head size": lambda g: {"weights": g.weights[:, :-1].contiguous()},
    "another length": lambda g: {"length": g.length + 1},
    "too few slots in front": lambda g: {"prefix_slots": g.prefix_slots - 1},
    "a ring that is too long": lambda g: {"window": 2000, "length": 1500},
    "heads twice": lambda g: {"heads": [1]},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_table_is_made_of_valid_buffers_only(damage):
    groups = model_and_cache(rows=2)[2].layers[0].groups
    KVTable(groups, 1)
    for name, value in DAMAGE[damage](groups[0]).items():
        setattr(groups[0], name, value)
    with pytest.raises(HeadsinkError, match=r"^(cache|KV heads)"):
        KVTable(groups, 1)


@pytest.mark.slow
def test_a_step_needs_a_token_of_every_row():
    model, _, cache = model_and_cache(rows=2)
    with open_decoder(model, cache) as step:
        for rows in (1, 3):
            with pytest.raises(HeadsinkError, match=r"^decode: sequences with new tokens: "):
                step.run(torch.full((rows,), 5))
        with pytest.raises(HeadsinkError, match=r"^decode: positions: "):
            step.run(torch.tensor([5, 5]), torch.tensor([30]))
        assert step.run(torch.tensor([5, 6])).shape == (2, 211)


def test_a_step_needs_a_cache_of_its_model():
    model, _, cache = model_and_cache()
    assert decoder(model, cache).run(torch.tensor([5])).shape == (1, 211)
    for other in (tiny("qwen3"), tiny("llama-mha"), copy.deepcopy(model).bfloat16()):
        with pytest.raises(HeadsinkError, match=r"^decode: KV heads, head size, dtype, "):
            decoder(other, cache)
    del cache.layers[2]
    with pytest.raises(HeadsinkError, match=r"^decode: layers of the cache: 2, and must be 3"):
        decoder(model, cache)


CHANGES = {
    "another token": lambda model, plan, cache: model(torch.tensor([[7]]), **cache_argument(cache)),
    "crop": lambda model, plan, cache: cache.crop(-1),
    "rows": lambda model, plan, cache: cache.batch_repeat_interleave(2),
    "order": lambda model, plan, cache: cache.reorder_cache(torch.tensor([0])),
    "reset": lambda model, plan, cache: cache.reset(),
    "hold": lambda model, plan, cache: cache.freeze(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_detects_a_changed_cache(change):
    model, plan, cache = model_and_cache(tokens=4 if change == "crop" else 30)
    step, rows = decoder(model, cache), 2 if change == "rows" else 1
    step.run(torch.tensor([5]))
    step.start_evicting()
    with headsink.apply(model, plan), torch.no_grad():
        CHANGES[change](model, plan, cache)
    with pytest.raises(HeadsinkError, match=r"^decode: the cache was changed by other code"):
        step.run(torch.full((rows,), 6))
    if change == "reset":
        with pytest.raises(HeadsinkError, match="the cache is empty"):
            step.resume()
        return
    again = copy.deepcopy(cache)
    step.resume()
    found = step.run(torch.full((rows,), 6))
    with headsink.apply(model, plan), torch.no_grad():
        expected = model(torch.full((rows, 1), 6), **cache_argument(again)).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_step_detects_a_changed_model(kind):
    model, _, cache = model_and_cache(kind=kind)
    step = decoder(model, cache)
    step.run(torch.tensor([5]))
    model.to(torch.bfloat16 if kind == torch.float32 else torch.float32)
    with pytest.raises(HeadsinkError, match=r"^decode: the model was changed"):
        step.run(torch.tensor([6]))
    with pytest.raises(HeadsinkError, match=r"^decode: KV heads, head size, dtype, "):
        decoder(model, cache)


@pytest.mark.slow
def test_a_gpu_step_detects_the_same_changes(device):
    from headsink.decoding.cuda import Decoder

    model, plan, cache = model_and_cache(rows=2)
    model.to(device)
    cache = headsink.new_cache(model, plan)
    ids = torch.randint(3, 211, (2, 12), device=device)
    with headsink.apply(model, plan), torch.no_grad():
        model(ids, **cache_argument(cache))
        step = Decoder(model, cache)
        with pytest.raises(HeadsinkError, match=r"^decode: sequences with new tokens: \(1,\), and must be \(2,\)"):
            step.run(ids[:1, 0])
        with pytest.raises(HeadsinkError, match="several tokens at once"):
            step.read(ids[:, :2])
        cache.reorder_cache(torch.tensor([1, 0], device=device))
        with pytest.raises(HeadsinkError, match=r"^decode: the cache was changed by other code"):
            step.run(ids[:, 0])
        step.resume()
        model.bfloat16()
        with pytest.raises(HeadsinkError, match=r"^decode: the model was changed"):
            step.run(ids[:, 0])
        for other in (model, tiny("qwen3").to(device), tiny("llama-mha").to(device)):
            with pytest.raises(HeadsinkError, match=r"^decode: KV heads, head size, dtype, "):
                Decoder(other, cache)


def test_gpu_kernels_need_tables_of_the_same_rows(device):
    from headsink.attention.cuda.append import append_keys, hide
    from headsink.attention.cuda.decode import attend

    table = torch.zeros(2, 3, len(KVField), dtype=torch.int64, device=device)
    length = torch.zeros(1, dtype=torch.int64, device=device)
    new, query = torch.randn(2, 3, 1, 8, device=device), torch.randn(2, 6, 1, 8, device=device)
    for wrong in (new[:1], new[:, :2].contiguous(), torch.cat([new, new])):
        with pytest.raises(HeadsinkError, match=r"^attention: the table"):
            append_keys(wrong, wrong, table, length)
    for wrong in (new.bfloat16(), new[..., :4].contiguous()):
        with pytest.raises(HeadsinkError, match=r"^cache: new keys and values"):
            append_keys(new, wrong, table, length)
    sideways = torch.randn(3, 2, 1, 8, device=device).transpose(0, 1)
    with pytest.raises(HeadsinkError, match=r"^cache: new keys and values"):
        append_keys(sideways, sideways, table, length)
    for wrong in (query[:1], query[:, :5].contiguous()):
        with pytest.raises(HeadsinkError, match=r"^attention: "):
            attend(wrong, table, length, 1.0)
    for wrong in (table.int(), table[..., :-1].contiguous()):
        with pytest.raises(HeadsinkError, match=r"^attention: the table"):
            attend(query, wrong, length, 1.0)
    for wrong in (torch.zeros(5, device=device), torch.zeros(12, device=device)[::2]):
        with pytest.raises(HeadsinkError, match=r"^attention: learned"):
            attend(query, table, length, 1.0, None, wrong)
    with pytest.raises(HeadsinkError, match=r"^hide: "):
        hide(torch.zeros(3, 4, dtype=torch.bool, device=device), table[None], length)


@pytest.mark.slow
def test_gpu_lifetimes_need_a_size_for_every_row(device):
    from headsink.eviction.lifetimes_cuda import better_ones

    with pytest.raises(HeadsinkError, match=r"^lifetimes: "):
        better_ones(torch.randn(3, 9, device=device), torch.ones(2, dtype=torch.int64, device=device))


def test_the_gpu_census_needs_values_shaped_like_keys(device):
    from headsink.attention.cuda import statistics
    from headsink.attention.params import Inputs

    key, rows = torch.randn(1, 2, 9, 16, device=device), torch.arange(9, device=device)
    given = {"module": None, "layer": 0, "query": torch.randn(1, 4, 9, 16, device=device), "key": key, "value": key}
    assert statistics.first_and_all(Inputs(**given, scaling=1.0), rows).shape == (2, 4, 9)
    for wrong in ({"value": key[..., :8]}, {"value": key.bfloat16()}, {"query": given["query"][:, :3]}):
        with pytest.raises(HeadsinkError, match=r"^census: "):
            statistics.first_and_all(Inputs(**given | wrong, scaling=1.0), rows)

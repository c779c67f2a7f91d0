"""Decoding on a GPU: kernels against float64, and whole models with the CUDA-graph decode step."""

from __future__ import annotations

import random
from contextlib import contextmanager

import offline
import pytest
import torch
from families import tiny
from plans import random_plan, window_plan
from reference import reference_logits
from torch import Tensor
from waiting import Waiting

from headsink import Pattern, Plan, apply, generate_lossless, new_cache
from headsink.attention.cuda.decode import attend
from headsink.attention.int8 import dequantize, quantize
from headsink.attention.kv_table import KVField
from headsink.decoding.cuda import Decoder
from headsink.decoding.step import open_decoder, refusal
from headsink.generation.sequences import Speculation
from headsink.generation.speculative import draft_cache
from headsink.models.transformers_names import cache_argument

pytestmark = pytest.mark.slow

TYPES = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def slow(query, keys, values, visible, scaling, softcap, sink_logits, rotated=None, sink=0):
    """query: [group, tokens, dim] over the keys of one head. Returns output and log-sum-exp in float64."""
    tokens, n_keys = query.shape[1], len(keys)
    logits = query.double() @ keys.double().T * scaling
    if rotated is not None:
        logits[..., :sink] = rotated.double() @ keys[:sink].double().T * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    slots = torch.arange(n_keys, device=keys.device)
    ends = n_keys - tokens + torch.arange(tokens, device=keys.device)[:, None]
    logits = logits.masked_fill(~(visible & (slots <= ends)), float("-inf"))
    lse = logits.logsumexp(-1)
    if sink_logits is not None:
        logits = torch.cat([logits, sink_logits.double()[:, None, None].expand(*logits.shape[:2], 1)], -1)
    return logits.softmax(-1).nan_to_num(0.0)[..., :n_keys] @ values.double(), lse


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("sizes", "group", "tokens", "dim", "programs", "options"),
    [
        ([[100, 300]], 3, 1, 64, 4, {}),
        ([[1, 5, 200], [700, 64, 65]], 4, 1, 80, 5, {}),
        ([[3, 5, 200], [270, 64, 65]], 2, 3, 96, 7, {"softcap": 0.8}),
        ([[0, 64]], 2, 1, 128, 7, {"sink_logits": True}),
        ([[0, 0]], 2, 1, 16, 3, {"sink_logits": True}),
        ([[130]], 1, 1, 256, 4, {"softcap": 3.0, "sink_logits": True}),
        ([[130], [1], [1]], 1, 5, 192, 1, {}),
        ([[300, 70], [1, 200]], 2, 1, 64, 4, {"padded": True}),
        ([[300, 70], [1, 200]], 2, 1, 64, 4, {"rotated": True}),
        ([[300, 70], [1, 200]], 2, 3, 80, 4, {"int8": True}),
        ([[130, 5]], 2, 1, 64, 3, {"int8": True, "rotated": True, "softcap": 3.0, "sink_logits": True}),
    ],
    ids=str,
)
def test_attention_over_heads_of_any_length(device, dtype, sizes, group, tokens, dim, programs, options):
    texts, heads = len(sizes), len(sizes[0])
    query = (torch.randn(texts, heads * group, tokens, dim) * 2).to(device, dtype)
    sink_logits = torch.randn(heads * group, device=device) if options.get("sink_logits") else None
    rotated = torch.randn_like(query) if options.get("rotated") else None
    table = torch.zeros(texts, heads, len(KVField), dtype=torch.int64)
    buffers, expected, expected_lse = [], [], []
    for text in range(texts):
        for head in range(heads):
            size, spare = sizes[text][head], 7
            keys, values = torch.randn(2, size + spare, dim).to(device, dtype)
            keys[size:] = values[size:] = float("nan")  # none of these may be read
            visible = torch.rand(size + spare).to(device) < 0.8
            rows = keys, values
            if options.get("int8"):
                rows = tuple(quantize(t.float()).to(device) for t in rows)
                keys, values = (dequantize(t, torch.float32) for t in rows)
            buffers.append((*rows, visible))
            for field, buffer in zip((KVField.KEYS, KVField.VALUES, KVField.VISIBLE), buffers[-1], strict=True):
                table[text, head, field] = buffer.data_ptr()
            pad = int(torch.randint(size + 1, ())) if options.get("padded") else 0
            visible[:pad] = False
            keys[: pad // 128 * 128] = float("nan")  # whole tiles of padding are not read
            table[text, head, KVField.WINDOW], table[text, head, KVField.PAD] = (1000 if pad else size), pad
            if pad:  # a head that has evicted nothing
                table[text, head, KVField.START] = 1000 - size
                table[text, head, KVField.PAD] += 1000 - size
            own = slice(head * group, (head + 1) * group)
            given = query[text, own], keys[:size], values[:size], visible[:size], dim**-0.5
            given = tuple(t.nan_to_num(0.0) if torch.is_tensor(t) else t for t in given)
            sink = table[text, head, KVField.SINK] = min(size, 5 + head)
            extra = (t if t is None else t[own] for t in (sink_logits, None if rotated is None else rotated[text]))
            found = slow(*given, options.get("softcap"), *extra, sink)
            expected.append(found[0])
            expected_lse.append(found[1])
    length = torch.tensor([1000 - tokens], device=device)
    given = query, table.to(device), length, dim**-0.5, options.get("softcap"), sink_logits, rotated, programs
    output, lse = attend(*given, int8=options.get("int8", False))
    error = TYPES[dtype]
    torch.testing.assert_close(output.double(), torch.stack(expected).view_as(output), atol=error, rtol=error)
    torch.testing.assert_close(lse.double(), torch.stack(expected_lse).view_as(lse), atol=error, rtol=error)


def test_host_synchronisation_is_detected():
    with pytest.raises(AssertionError, match="_local_scalar"), Waiting():
        torch.ones(1).item()


@pytest.fixture
def not_waiting(monkeypatch):
    def watched(self, one):
        with Waiting():
            one_pass(self, one)

    one_pass = Decoder._pass
    monkeypatch.setattr(Decoder, "_pass", watched)


def small(rng: random.Random) -> Pattern:
    """Small patterns, which evict early."""
    if rng.random() < 0.2:
        return Pattern()
    return Pattern(rng.choice([0, 1, 3]), rng.choice([0, 2, 4]), rng.choice([0, 1, 5, 9]))


@contextmanager
def on(device: torch.device, family: str, seed: int, draw=small, dtype=torch.float32):
    model = tiny(family, seed, dtype, layers=2)  # the interpreter is slow
    plan = random_plan(model, seed, draw)
    yield model.to(device), plan


@pytest.mark.usefixtures("not_waiting")
@pytest.mark.parametrize(("family", "seed"), [("llama", 0), ("llama-mha", 1), ("qwen3", 2), ("phi3", 3), ("olmo2", 4)])
def test_decode_step_equals_the_reference(device, family, seed):
    """Prefill in two chunks, then tokens by the decode step, with padding, against the reference."""
    with on(device, family, seed) as (model, plan):
        ids = torch.randint(3, 200, (2, 30), device=device)
        mask = torch.ones_like(ids)
        mask[1, :6] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = reference_logits(model.cpu(), plan, ids.cpu(), mask.cpu(), [17, 9, 1, 1, 1, 1])
        model.to(device)
        with torch.no_grad(), apply(model, plan, compiled=False):
            cache = new_cache(model, plan)
            for part in (slice(0, 17), slice(17, 26)):
                read = model(
                    ids[:, part],
                    **cache_argument(cache),
                    attention_mask=mask[:, : part.stop],
                    position_ids=positions[:, part],
                )
            torch.testing.assert_close(read.logits.cpu(), expected[:, 17:26], atol=2e-4, rtol=2e-4)
            assert refusal(model) is None
            with open_decoder(model, cache) as step:
                for token in range(26, 29):
                    found = step.run(ids[:, token])
                    torch.testing.assert_close(found.cpu(), expected[:, token], atol=2e-4, rtol=2e-4)
            again = model(
                ids[:, 29:], **cache_argument(cache), attention_mask=mask, position_ids=positions[:, 29:]
            ).logits
    torch.testing.assert_close(again.cpu(), expected[:, 29:], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("family", "seed", "everything"), [("gemma2", 0, False), ("gpt-oss", 1, False), ("gpt-oss", 1, True)]
)
def test_capped_and_learned_logits_in_passes_of_the_model(device, family, seed, everything):
    """These models have sliding-window layers, so no decode step. Two chunks, single tokens, and some after freeze."""
    with on(device, family, seed) as (model, plan):
        plan = Plan.full(model) if everything else plan
        ids = torch.randint(3, 200, (2, 31), device=device)
        mask = torch.ones_like(ids)
        mask[1, :6] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = reference_logits(model.cpu(), plan, ids.cpu(), mask.cpu(), [17, 9, 1, 1, 3], freeze=28)
        model.to(device)
        with torch.no_grad(), apply(model, plan, compiled=False):
            cache = new_cache(model, plan)
            for start, end in ((0, 17), (17, 26), (26, 27), (27, 28), (28, 31)):
                if start == 28:
                    cache.freeze()
                given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
                found = model(ids[:, start:end], **cache_argument(cache), **given).logits.cpu()
                real = mask[:, start:end].bool().cpu()
                torch.testing.assert_close(found[real], expected[:, start:end][real], atol=2e-4, rtol=2e-4)


@pytest.mark.usefixtures("not_waiting")
def test_the_step_uses_cache_relative_positions(device):
    model = tiny("llama", seed=1, layers=2).to(device)
    plan, ids = window_plan(model, 1), torch.randint(3, 200, (2, 37), device=device)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), apply(model, plan, compiled=False):
        one, other = new_cache(model, plan), new_cache(model, plan)
        for cache in (one, other):
            model(ids[:, :33], **cache_argument(cache), attention_mask=mask[:, :33], position_ids=positions[:, :33])
        with open_decoder(model, one) as step:
            for token in range(33, 37):
                now = slice(token, token + 1)
                expected = model(
                    ids[:, now],
                    **cache_argument(other),
                    attention_mask=mask[:, : token + 1],
                    position_ids=positions[:, now],
                ).logits[:, 0]
                torch.testing.assert_close(step.run(ids[:, token]), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_is_the_same_with_the_step_and_without(device, beams, monkeypatch):
    steps, run = [], Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda *given: steps.append(1) or run(*given))
    with on(device, "qwen2", 5) as (model, plan):
        ids, texts = torch.randint(3, 200, (2, 21), device=device), []
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "num_beams": beams}
        for compiled in (False, None, True):  # None: not on a GPU
            steps.clear()
            with apply(model, plan, compiled=compiled):
                texts.append(model.generate(ids, **options))
            assert len(steps) == (7 if compiled else 0)
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_the_step_keeps_the_same_top_k_keys_as_the_cache(device, kv_dtype):
    """Buffers, scores and positions after single tokens equal those of the layers' eager code."""
    with on(device, "llama", 6) as (model, plan):
        ids = torch.randint(3, 200, (1, 28), device=device)
        with torch.no_grad(), apply(model, plan, compiled=False):
            one, other = (new_cache(model, plan, kv_dtype=kv_dtype) for _ in range(2))
            for cache in (one, other):
                model(ids[:, :20], **cache_argument(cache))
            with open_decoder(model, one) as step:
                for token in range(20, 28):
                    step.run(ids[:, token])
        layers = zip(one.layers, other.layers, strict=True)
        before, after = next(layers)
        for mine, theirs in zip(before.groups, after.groups, strict=True):
            assert mine.length == 28
            # The first layer's keys depend on the token only, so plain code can compute the same ones.
            key, value = first_layer(model, ids[:, 20:])
            for token in range(8):
                theirs.append_keys(key[:, theirs.heads, token : token + 1], value[:, theirs.heads, token : token + 1])
            assert torch.equal(mine.visible, theirs.visible)
            for own, expected in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                if kv_dtype == "int8":
                    own, expected = (dequantize(rows, torch.float32) for rows in (own, expected))
                torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(mine.scores, theirs.scores, atol=1e-4, rtol=1e-4)


def first_layer(model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first layer's keys and values of the tokens from column 20 on, for a Llama."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    layer = model.model.layers[0]
    states = layer.input_layernorm(model.model.embed_tokens(ids))
    shape = (*ids.shape, -1, layer.self_attn.head_dim)
    key, value = (
        projection(states).view(shape).transpose(1, 2)
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    cos, sin = model.model.rotary_emb(states, torch.arange(20, 20 + ids.shape[1], device=ids.device)[None])
    return apply_rotary_pos_emb(key, key, cos, sin)[0], value


def test_refusals_give_the_reason(device, monkeypatch):
    model = tiny("gemma3").to(device)
    assert refusal(model) == "this model has layers of kind sliding_attention"
    model = tiny("llama").to(device).train()
    assert refusal(model) == "it is in training mode: call model.eval()"
    monkeypatch.setattr("headsink.utils.device.triton_installed", lambda: False)
    assert refusal(tiny("llama").to(device)) == "triton is not installed: pip install 'headsink[gpu]'"


def test_an_all_full_plan_runs_by_the_step(device):
    model = tiny("llama", layers=2)
    plan = Plan.full(model)
    ids = torch.randint(3, 200, (1, 28), device=device)
    with torch.no_grad(), apply(model.to(device), plan):
        expected = model(ids).logits
        cache = new_cache(model, plan, exact=False)
        model(ids[:, :25], **cache_argument(cache))
        with open_decoder(model, cache) as step:
            for token in range(25, 28):
                torch.testing.assert_close(step.run(ids[:, token]), expected[:, token], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "seed"), [("llama", 13), ("gemma3", 8)])
def test_lossless_text_equals_the_models(device, family, seed):
    """Drafts by the decode step where it supports the model, verified by passes over several tokens."""
    with on(device, family, seed) as (model, plan):
        ids, mask = torch.randint(3, 200, (2, 21), device=device), torch.ones(2, 21, dtype=torch.int64, device=device)
        mask[0, :4] = 0
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
        expected = model.generate(ids, **options)
        speculation = Speculation()
        found = generate_lossless(model, plan, ids, draft_tokens=2, speculation=speculation, **options)
    assert torch.equal(found, expected)
    assert (
        0 < speculation.accepted < speculation.drafted
    )  # rows accept different numbers of tokens, so some columns are hidden in one of them


def test_appending_and_hiding_columns_equals_the_cache(device):
    """Accepted tokens of lossless mode: its kernels against the cache's code."""
    with on(device, "llama", 9) as (model, plan):
        ids = torch.randint(3, 200, (2, 30), device=device)
        everything = Plan.full(model)
        with torch.no_grad(), apply(model, everything):
            full = new_cache(model, everything, exact=False)
            model(ids[:, :25], **cache_argument(full))
            one, other = draft_cache(model, plan, full), draft_cache(model, plan, full)
            model(ids[:, 25:], **cache_argument(full))
        hidden = torch.tensor([[False, False, True, True], [False] * 4], device=device)
        step = Decoder(model, one)
        step.take(full, 4)
        step.hide(hidden)
        step.start_evicting()
        for mine, theirs in zip(other.layers, full.layers, strict=True):
            mine.append(*theirs.groups[0].last(4))
        other.hide(hidden)
    assert one.get_seq_length() == other.get_seq_length() == 29
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        for ours, own in zip(mine.groups, theirs.groups, strict=True):
            end = own.prefix_slots + own.length - own.start
            for name in ("keys", "values", "visible"):
                assert torch.equal(getattr(ours, name)[:, :, :end], getattr(own, name)[:, :, :end]), name


LAUNCHES = """
import torch
from headsink.attention.cuda.decode import attend
from headsink.decoding.cuda import Decoder
from headsink.attention.cuda.append import append_keys, hide
from headsink.eviction.lifetimes_cuda import better_ones
from headsink.attention.cuda.prefill import attend as attend_many
from headsink.attention.kv_table import KVField
from headsink.attention.visibility import KeyVisibility
from headsink.models.transformers_names import cache_argument

better_ones(torch.randn(8, 1000), torch.full((8,), 100))
hide(torch.zeros(4, 5, dtype=torch.bool), torch.zeros(2, 4, 8, len(KVField), dtype=torch.int64), torch.tensor([0]))
for dim in (64, 128, 256):
    table = torch.zeros(4, 8, len(KVField), dtype=torch.int64)
    one, five = (torch.zeros(4, 32, tokens, dim, dtype=torch.bfloat16) for tokens in (1, 5))
    attend(one, table, torch.tensor([0]), 1.0, programs=264)
    attend(five, table, torch.tensor([0]), 1.0, 5.0, torch.zeros(32), five, programs=264)  # all that there may be
    append_keys(one[:, :8].contiguous(), one[:, :8].contiguous(), table, torch.tensor([0]))
    query, keys = torch.zeros(1, 32, 300, dim, dtype=torch.bfloat16), torch.zeros(8, 400, dim, dtype=torch.bfloat16)
    if dim == 128:
        attend(one, table, torch.tensor([0]), 1.0, programs=264, int8=True)
        append_keys(one[:, :8].contiguous(), one[:, :8].contiguous(), table, torch.tensor([0]), True)
        attend_many(query, keys, keys, KeyVisibility(torch.zeros(8, 400), 100, 5, 5, 90, False, 5, 400), 1.0)
    attend_many(query, keys, keys, KeyVisibility(torch.zeros(8, 400), 100, 5, 5, 90, True, 5, 400), 1.0, 5.0, torch.zeros(32))
"""


def test_kernels_compile_for_an_h100(tmp_path):
    """As launched for models of 1 to 8 billion parameters: within shared memory, and with few register spills."""
    kernels = offline.compiled(LAUNCHES, tmp_path)
    assert {kernel["name"] for kernel in kernels} == {
        "_attend_part",
        "_combine",
        "_enter",
        "_hide",
        "_list",
        "_find",
        "_attend_block",
    }
    for kernel in kernels:
        assert kernel["shared"] <= 227 * 1024, kernel["name"]
        assert kernel["spilled"] <= 128, kernel["name"]  # bytes per thread
    few, many = (
        [kernel["ptx"] for kernel in kernels if kernel["name"] == name] for name in ("_attend_part", "_attend_block")
    )
    # 16-byte copies that bypass registers; rows of int8 begin at multiples of 4 bytes
    assert ["cp.async.cg.shared.global" in ptx for ptx in few].count(False) == 1
    assert all("wgmma" in ptx for ptx in many)  # Hopper's tensor cores

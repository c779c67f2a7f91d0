"""Cache-relative positions equal a reference of StreamingLLM, far past the model's maximum."""

import pytest
import torch
from families import FAMILIES, tiny
from feeding import WAYS, feed, padded
from plans import random_plan, window_plan
from reference import own_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.attention.reference import masked_attention
from headsink.decoding.step import open_decoder
from headsink.generation.generate import generate
from headsink.models.rope import Rotary, inverse_frequencies, rotate_back
from headsink.models.spec import decoder
from headsink.models.transformers_names import cache_argument

ROTARY = [name for name in FAMILIES if name != "mistral-sliding"]


def cos_and_sin(model, positions):
    """Return transformers' cos and sin of positions [tokens]: [tokens, dim]."""
    rotary = decoder(model).rotary_emb
    kind = ("full_attention",) if hasattr(rotary, "layer_types") else ()
    cos, sin = rotary(torch.empty(0, dtype=torch.float64), positions[None], *kind)
    if cos.shape[-1] == len(inverse_frequencies(model)):  # gpt-oss has one value per pair
        cos, sin = (torch.cat([t, t], -1) for t in (cos, sin))
    size = getattr(rotary, "attention_scaling", 1.0)  # yarn's extra scaling of keys and queries
    return cos[0] / size, sin[0] / size


def rotate(vectors, cos, sin):
    """Rotate vectors [..., tokens, dim] by cos and sin [tokens, dim]."""
    rotated, rest = vectors[..., : cos.shape[-1]], vectors[..., cos.shape[-1] :]
    a, b = rotated.chunk(2, -1)
    return torch.cat([rotated * cos + torch.cat([-b, a], -1) * sin, rest], -1)


def streaming(model, plan, ids, mask):
    """Return logits by the definition: every query and its visible keys are rotated by their index among those keys."""

    cos, sin = cos_and_sin(model, torch.arange(ids.shape[1]))

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        heads = plan.layers[module.layer_idx]
        if heads is None:
            return own_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        sink_logits = kwargs.get("s_aux")
        output, group = torch.zeros_like(query), query.shape[1] // key.shape[1]
        for row in range(len(query)):
            first = 0 if mask is None else int(mask[row].int().argmax())
            tokens = query.shape[2] - first
            q, k = (rotate(t[row, :, first:], cos[:tokens], -sin[:tokens]) for t in (query, key))  # undo the rotation
            for i in range(tokens):
                for n, pattern in enumerate(head.pattern for head in heads):
                    seen = torch.tensor(
                        [j for j in range(i + 1) if j < pattern.sink or i - j < pattern.window], dtype=torch.long
                    )
                    if len(seen):
                        rows = slice(n * group, (n + 1) * group)
                        # A head without a window has its query one past the sink tokens, if it does not attend to itself.
                        at, all_seen = slice(len(seen) - 1, len(seen)), slice(len(seen))
                        own, keys = (
                            rotate(q[rows, i : i + 1], cos[at], sin[at]),
                            rotate(k[n, seen], cos[all_seen], sin[all_seen]),
                        )
                        given = own[None], keys[None, None], value[row : row + 1, n : n + 1, first + seen]
                        softmax = scaling, kwargs.get("softcap"), None if sink_logits is None else sink_logits[rows]
                        every = torch.ones(1, 1, 1, len(seen), dtype=torch.bool)
                        output[row, rows, first + i] = masked_attention(*given, every, *softmax)[0, :, 0]
        return output.transpose(1, 2), None

    AttentionInterface.register("streaming", attention)
    AttentionMaskInterface.register("streaming", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("streaming")
    position_ids = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    try:
        with torch.no_grad():
            return model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)


@pytest.mark.slow
@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_positions_are_cache_relative(family, padding, case_seed):
    model = tiny(family, dtype=torch.float64)
    ids, mask = padded() if padding else (torch.randint(3, 211, (2, 61)), None)
    plan, real = window_plan(model, case_seed), slice(None) if mask is None else mask.bool()
    expected = streaming(model, plan, ids, mask)
    for way, sizes in WAYS.items():
        found, _ = feed(model, plan, ids, sizes, mask)
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-4, msg=lambda m, way=way: f"{way}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_steps_use_the_same_positions(family, case_seed):
    model = tiny(family, seed=case_seed)
    plan, ids = window_plan(model, case_seed), torch.randint(3, 211, (1, 640))  # over the model's 512
    ours, theirs = headsink.new_cache(model, plan), headsink.new_cache(model, plan)
    with headsink.apply(model, plan), torch.no_grad():
        for one in (ours, theirs):
            model(ids[:, :3], **cache_argument(one))
        expected = model(ids[:, 3:], **cache_argument(theirs)).logits[0]
        with open_decoder(model, ours) as step:
            found = torch.cat([step.run(torch.tensor([token])) for token in ids[0, 3:].tolist()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_compiled_steps_of_a_batch_use_the_same_positions():
    model = tiny("llama", seed=1)
    plan, ids = window_plan(model, 1), torch.randint(3, 211, (3, 140))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, :9] = 0, 0
    expected, _ = feed(model, plan, ids, [10, 1], mask)
    cache = headsink.new_cache(model, plan)
    with headsink.apply(model, plan), torch.no_grad():
        positions = (mask[:, :10].cumsum(1) - 1).clamp(min=0)
        model(ids[:, :10], **cache_argument(cache), attention_mask=mask[:, :10], position_ids=positions)
        with open_decoder(model, cache) as step:
            found = torch.stack([step.run(ids[:, column]) for column in range(10, 140)], 1)
    torch.testing.assert_close(found, expected[:, 10:], rtol=1e-3, atol=1e-3)


def test_tokens_can_be_cropped():
    model = tiny("llama", dtype=torch.float64)
    plan, ids = window_plan(model, 1), torch.randint(3, 211, (1, 60))
    expected, _ = feed(model, plan, ids, [1000])
    cache = headsink.new_cache(model, plan)
    with headsink.apply(model, plan), torch.no_grad():
        model(ids[:, :30], **cache_argument(cache))
        cache.activate_past_recording()
        model(torch.randint(3, 211, (1, 7)), **cache_argument(cache))
        cache.crop(-7)
        found = model(ids[:, 30:], **cache_argument(cache)).logits
    torch.testing.assert_close(found, expected[:, 30:], rtol=0, atol=1e-5)


def test_a_sequence_within_its_window_equals_the_model():
    model = tiny("qwen3")
    plan, ids = Plan.uniform(model, Pattern(4, 0, 60), positions="cache-relative"), torch.randint(3, 211, (2, 64))
    found, _ = feed(model, plan, ids, [1000])
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_no_distance_exceeds_the_cache():
    """A text that repeats one token has the same logits at any length."""
    model = tiny("llama", dtype=torch.float64)
    plan, ids = Plan.uniform(model, Pattern(4, 0, 12), positions="cache-relative"), torch.full((1, 3000), 7)
    found, cache = feed(model, plan, ids, [500])
    torch.testing.assert_close(found[:, 2900:], found[:, 100:200], rtol=0, atol=1e-4)  # angles are float32
    assert cache.layers[0].groups[0].keys.shape[2] == 16
    text = Plan.uniform(model, Pattern(4, 0, 12))
    with pytest.raises(
        HeadsinkError, match=r"a text has 1000 tokens, over the model's maximum of 512; .* positions 'cache-relative'"
    ):
        feed(model, text, ids, [500])


def test_inverse_rotation_undoes_a_rotation():
    model, positions = tiny("phi3"), torch.tensor([3, 700, 12345])
    vectors = torch.randn(2, 4, 3, 12, dtype=torch.float64)
    there, rotary = rotate(vectors, *cos_and_sin(model, positions)), Rotary(inverse_frequencies(model))
    torch.testing.assert_close(rotate_back(there, positions, rotary), vectors, rtol=0, atol=5e-3)
    torch.testing.assert_close(rotate_back(there, positions - positions, rotary), there)


def test_cache_relative_positions_need_windows_only(tmp_path):
    model = tiny("llama")
    for pattern, field in (
        (Pattern(), "layers.0.0 has full attention"),
        (Pattern(1, 2, 3), "layers.0.0 has top-k keys"),
    ):
        plan = random_plan(model, 0, lambda _, pattern=pattern: pattern)
        path = tmp_path / "plan.json"
        path.write_text(plan.to_json().replace('"positions": "absolute"', '"positions": "cache-relative"'))
        with pytest.raises(
            HeadsinkError, match=f"positions: 'cache-relative' needs windows without top-k keys, but {field}"
        ):
            Plan.load(path)
    plan = Plan.uniform(model, Pattern(1, 0, 5), positions="cache-relative")
    cache = headsink.new_cache(model, plan)
    with pytest.raises(HeadsinkError, match="positions: a cache with 'cache-relative' ones must keep evicting"):
        cache.freeze()
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan


def test_more_positions_than_the_model_has_are_refused():
    model = tiny("llama")
    most = model.config.max_position_embeddings
    Plan.uniform(model, Pattern(4, 0, most - 4), positions="cache-relative").check(model)
    for pattern in (Pattern(4, 0, most - 3), Pattern(2**31 - 1, 0, 1)):
        plan = Plan.uniform(model, pattern, positions="cache-relative")
        with pytest.raises(HeadsinkError, match=rf"layers\.0\.0: .* more positions than the model has, {most}"):
            plan.check(model)


def test_generate_exceeds_the_models_maximum(tokenizer):
    model = tiny("llama")
    plan, ids = Plan.uniform(model, Pattern(4, 0, 30), positions="cache-relative"), list(range(3, 200)) * 2
    found = generate(model, tokenizer, ids, plan, max_new_tokens=300)
    assert len(found.ids) == 300
    assert found.kv_bytes < generate(model, tokenizer, ids[:100], Plan.full(model), max_new_tokens=20).kv_bytes
    with pytest.raises(HeadsinkError, match="394 tokens and 300 new ones are over the model"):
        generate(model, tokenizer, ids, Plan.uniform(model, Pattern(4, 0, 30)), max_new_tokens=300)

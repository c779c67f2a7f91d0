"""The compiled decode step gives the logits, cache and text of the model under the same plan."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
import transformers
from architectures import make
from families import FAMILIES, SHAPE, tiny
from plans import QUALITY, random_plan

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.generation.decode import decode, open_decoder, prepare, refusal
from headsink.generation.step_cpu import AHEAD
from headsink.generation.step_fields import NormKind, Scores
from headsink.generation.step_kernel import run as kernel
from headsink.generation.step_parts import parts_of
from headsink.models.transformers_names import cache_argument
from headsink.plan.schema import Quality

DECODE = {"custom_generate": decode}


def prompt(tokens, seed=0):
    return torch.randint(3, 211, (1, tokens), generator=torch.Generator().manual_seed(seed))


def cache_contents(group):
    """Return scores, prefix slots and ring contents without spare slots, whose number may differ between caches."""
    ring = slice(group.prefix_slots, group.prefix_slots + group._held())
    buffers = group.keys, group.values, group.visible
    top_k = int((group.scores[0, 0] > float("-inf")).sum())
    return [
        group.scores[..., :top_k],
        *(b[:, :, : group.pattern.sink + top_k] for b in buffers),
        *(b[:, :, ring] for b in buffers),
    ]


def same_state(found, expected):
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.get_seq_length() == other.get_seq_length()
        for a, b in zip(one.groups, other.groups, strict=True):
            for x, y in zip(cache_contents(a), cache_contents(b), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 7, 70])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_the_model(family, length, case_seed):
    seed = case_seed % 3
    model = tiny(family, seed=seed)
    plan, ids = random_plan(model, seed), prompt(length + 2 * AHEAD + 5, seed)
    if seed == 2:  # top-k slots grow with the sequence
        plan = random_plan(model, seed, lambda _: Pattern(2, 200, 9))
    ours, theirs = headsink.new_cache(model, plan), headsink.new_cache(model, plan)
    with headsink.apply(model, plan), torch.no_grad():
        for one in (ours, theirs):
            model(ids[:, :length], **cache_argument(one))
        with open_decoder(model, ours) as step:
            for token in ids[0, length:].tolist():
                found = step.run(torch.tensor([token]))
                expected = model(torch.tensor([[token]]), **cache_argument(theirs)).logits[:, -1]
                torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    same_state(ours, theirs)
    with headsink.apply(model, plan), torch.no_grad():  # the model continues from it
        found, expected = (model(ids[:, :9], **cache_argument(one)).logits for one in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=3e-4, atol=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("texts", [2, 3, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_sequences(family, texts, case_seed):
    seed = case_seed % 3
    model, length = tiny(family, seed=seed), 40
    plan = random_plan(model, seed) if seed < 2 else random_plan(model, seed, lambda _: Pattern(2, 200, 9))
    ids = torch.randint(3, 211, (texts, length + AHEAD + 20))
    mask = torch.ones_like(ids)
    if seed:
        mask[0, : 3 + 30 * (seed - 1)], mask[1, : length - 1] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ours, theirs = headsink.new_cache(model, plan), headsink.new_cache(model, plan)
    with headsink.apply(model, plan), torch.no_grad():

        def read(cache, start, end, model=model, ids=ids, mask=mask, positions=positions):
            new = slice(start, end)
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, new]}
            return model(ids[:, new], **cache_argument(cache), **given).logits[:, -1]

        read(ours, 0, length)
        read(theirs, 0, length)
        with open_decoder(model, ours) as step:
            for column in range(length, ids.shape[1] - 5):
                found, expected = step.run(ids[:, column]), read(theirs, column, column + 1)
                torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
        found, expected = (read(one, ids.shape[1] - 5, ids.shape[1]) for one in (ours, theirs))  # continues from it
    torch.testing.assert_close(found, expected, rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_step_is_closer_to_the_exact_model_than_the_model(family):
    exact = tiny(family).bfloat16()
    model, exact = copy.deepcopy(exact), exact.double()
    plan, ids = Plan.full(model), prompt(60)
    ours, theirs, truth = (headsink.new_cache(one, Plan.full(one)) for one in (model, model, exact))
    with torch.no_grad():
        with headsink.apply(model, plan):
            model(ids[:, :40], **cache_argument(ours))
            model(ids[:, :40], **cache_argument(theirs))
        with headsink.apply(exact, Plan.full(exact)):
            exact(ids[:, :40], **cache_argument(truth))
        errors = torch.zeros(2)
        with open_decoder(model, ours) as step:
            for token in ids[0, 40:].tolist():
                found = step.run(torch.tensor([token]))
                one = torch.tensor([[token]])
                with headsink.apply(model, plan):
                    expected = model(one, **cache_argument(theirs)).logits[:, -1].float()
                with headsink.apply(exact, Plan.full(exact)):
                    true = exact(one, **cache_argument(truth)).logits[:, -1].float()
                errors += torch.stack([(found - true).norm(), (expected - true).norm()])
    assert errors[0] < errors[1] < 0.1 * 20 * true.norm()


def test_a_compressed_cache_keeps_growing():
    model = tiny("llama")
    plan, ids = random_plan(model, 5), prompt(200)
    with torch.no_grad():
        caches = [headsink.compress(model, plan, ids[:, :100]) for _ in range(2)]
        with headsink.apply(model, plan), open_decoder(model, caches[0]) as step:
            for token in ids[0, 100:].tolist():
                expected = model(torch.tensor([[token]]), **cache_argument(caches[1])).logits[:, -1]
                torch.testing.assert_close(step.run(torch.tensor([token])), expected, rtol=2e-4, atol=2e-4)
    same_state(*caches)


def test_steps_and_forward_passes_alternate():
    """Each grows buffers whose addresses the other has read."""
    model = tiny("llama")
    plan, ids = Plan.of(model, [[Pattern(), Pattern(2, 0, 300)]] * 3), prompt(160)
    ours, theirs = headsink.new_cache(model, plan), headsink.new_cache(model, plan)
    with headsink.apply(model, plan), torch.no_grad():
        expected = torch.cat(
            [model(part, **cache_argument(theirs)).logits[0] for part in ids.split([100, *[1] * 60], 1)]
        )
        found = [model(ids[:, :100], **cache_argument(ours)).logits[0]]
        for start in range(100, 160, 10):
            found += [model(ids[:, n : n + 1], **cache_argument(ours)).logits[0] for n in range(start, start + 5)]
            before = ours.layers[0].groups[0].keys
            with open_decoder(model, ours) as step:
                found += [step.run(torch.tensor([token])) for token in ids[0, start + 5 : start + 10].tolist()]
            if start == 100:
                assert ours.layers[0].groups[0].keys is not before
    torch.testing.assert_close(torch.cat(found), expected, rtol=2e-4, atol=2e-4)


@cache
def generating():
    model = tiny("llama", seed=3)
    return model, random_plan(model, 1)


def generate(**options):
    model, plan = generating()
    ids = prompt(30)
    with headsink.apply(model, plan):
        cache = headsink.new_cache(model, plan)
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), max_new_tokens=50, **options
        )


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"do_sample": False, "eos_token_id": list(range(3, 60))},
        {"do_sample": False, "prefill_chunk_size": 7},
    ],
)
def test_generate_gives_the_same_text(options):
    torch.manual_seed(0)
    expected = generate(**options)
    torch.manual_seed(0)
    assert torch.equal(generate(**options, custom_generate=decode), expected)


@pytest.mark.parametrize("eos", [None, list(range(3, 30))])
@pytest.mark.parametrize("ways", [{"do_sample": False}, {"do_sample": True, "num_return_sequences": 2}])
def test_generate_gives_the_same_text_for_batches(ways, eos):
    model, plan = generating()
    ids, mask = torch.cat([prompt(30), prompt(30, 1), prompt(30, 2)]), torch.ones(3, 30, dtype=torch.int64)
    mask[0, :20], mask[2, :1] = 0, 0
    texts = []
    for loop in ({}, {"custom_generate": decode}):
        torch.manual_seed(0)
        with headsink.apply(model, plan):
            given = {"attention_mask": mask, "max_new_tokens": 40, "eos_token_id": eos, "pad_token_id": 0}
            texts.append(model.generate(ids, **given, **ways, **loop))
    assert torch.equal(*texts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_kernels_are_the_ones_called(dtype):
    model, plan = tiny("llama", dtype=dtype), Plan.full(tiny("llama"))
    prepare(model)
    compiled = list(kernel.signatures)
    cache = headsink.new_cache(model, plan)
    with headsink.apply(model, plan), torch.no_grad():
        model(prompt(5), **cache_argument(cache))
        with open_decoder(model, cache) as step:
            step.run(torch.tensor([7]))
    assert kernel.signatures == compiled


def test_threads_do_not_disturb_each_other():
    expected = generate(do_sample=False, custom_generate=decode)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(generate, do_sample=False, custom_generate=decode) for _ in range(8)]
    assert all(torch.equal(one.result(), expected) for one in found)


def test_a_sequence_beyond_the_verified_length_warns_once():
    model, plan = generating()
    plan = plan.model_copy(update={"quality": (Quality(**{**QUALITY, "context": 40}),)})
    with headsink.apply(model, plan), pytest.warns(UserWarning, match="has 41 tokens") as caught:
        model.generate(prompt(30), max_new_tokens=50, do_sample=False, custom_generate=decode)
    assert len([one for one in caught if "tokens, the plan's" in str(one.message)]) == 1


def test_an_error_between_steps_leaves_the_cache_intact():
    model, plan = generating()
    ids, cache = prompt(30), headsink.new_cache(model, plan)
    with headsink.apply(model, plan), torch.no_grad():
        model(ids, **cache_argument(cache))
        with open_decoder(model, cache) as step:
            step.run(torch.tensor([5]))
            with pytest.raises(IndexError):
                step.run(torch.tensor([211]))  # no such token
        assert cache.get_seq_length() == 31
        model(ids, **cache_argument(cache))


@pytest.mark.parametrize("name", ["GPT-2", "LFM2", "Phi-3.5 MoE", "Qwen2.5-VL"])
def test_unsupported_architectures_are_refused(name):
    model = make(name)
    assert refusal(model) is not None
    with pytest.raises(HeadsinkError, match="decode:"), headsink.apply(model, Plan.full(model)):
        model.generate(prompt(5), **cache_argument(headsink.new_cache(model, Plan.full(model))), custom_generate=decode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_gpt_oss_are_clamped_and_have_biases(dtype):
    model = tiny("gpt-oss")
    for layer in model.model.layers:
        layer.mlp.experts.limit = 0.05  # which most numbers exceed
        for bias in (layer.mlp.experts.gate_up_proj_bias, layer.mlp.experts.down_proj_bias, layer.mlp.router.bias):
            torch.nn.init.normal_(bias)
    assert refusal(model.to(dtype)) is None


def test_an_activation_with_parameters():
    model = make("Apertus")
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.act_fn.alpha_p)
        torch.nn.init.normal_(layer.mlp.act_fn.alpha_n)
    assert refusal(model) is None


def test_requirements_on_a_model():
    assert refusal(tiny("llama")) is None
    assert "float16" in refusal(tiny("llama").half())
    mixed = tiny("llama")
    mixed.lm_head.double()
    assert "float64" in refusal(mixed)
    changed = tiny("llama")
    changed.model.layers[1].mlp.up_proj = torch.nn.Sequential(changed.model.layers[1].mlp.up_proj)
    assert "Sequential" in refusal(changed)
    added = tiny("llama")
    added.model.layers[1].mlp.extra = torch.nn.Linear(2, 2)
    assert "LlamaMLP has a part that is not supported: extra" in refusal(added)
    watched = tiny("llama")
    watched.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert "hooks" in refusal(watched)
    assert "training" in refusal(tiny("llama").train())


def test_a_model_without_position_ids_is_refused():
    class Unplaced(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, **options):
            return super().forward(input_ids, attention_mask, **options)

    assert refusal(Unplaced(tiny("llama").config).eval()) == "it takes no position_ids"


def test_a_step_that_differs_from_the_model_is_refused():
    model = tiny("llama")
    model.model.layers[1].self_attn.scaling = 0.5  # which the step reads
    assert refusal(model) is None
    layer = tiny("llama", seed=1).model.layers[1]
    changed = tiny("llama", seed=1)
    changed.model.layers[1] = type("Doubled", (type(layer),), {"forward": doubled})(changed.config, 1)
    assert refusal(changed) == "its layers compute something that the step does not"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gain_of_a_norm_is_found_also_if_it_is_large(dtype):
    model = tiny("gemma3", dtype=dtype)  # its norms multiply by 1 + weight
    norm = model.model.layers[1].input_layernorm
    torch.nn.init.normal_(norm.weight, 90, 10)
    found = parts_of(model).blocks[1].before_attention
    torch.testing.assert_close(found.weight, norm.weight.float() + 1)
    assert found.kind == NormKind.RMS
    assert found.eps == norm.eps


def test_routers_are_read():
    config = transformers.Qwen3MoeConfig(
        **SHAPE, head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=False
    )
    (experts,) = parts_of(transformers.AutoModelForCausalLM.from_config(config).eval()).blocks[0].mlps
    assert (experts.top_k, experts.scores, experts.normalised, experts.scale) == (3, Scores.SOFTMAX, False, 1.0)
    config = transformers.Glm4MoeConfig(
        **SHAPE,
        head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        routed_scaling_factor=2.5,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.model.layers[0].mlp.gate.weight)
    model.model.layers[0].mlp.gate.e_score_correction_bias.normal_()
    experts, shared = parts_of(model).blocks[0].mlps
    assert (experts.top_k, experts.scores, experts.normalised, experts.scale) == (3, Scores.SIGMOID, True, 2.5)
    assert torch.equal(experts.bias, model.model.layers[0].mlp.gate.e_score_correction_bias)
    assert shared.share is None
    config.topk_group, config.n_group = 1, 4  # experts compete in groups first
    with pytest.raises(HeadsinkError, match="its router Glm4MoeTopkRouter chooses experts in another way"):
        parts_of(transformers.AutoModelForCausalLM.from_config(config).eval())


def doubled(self, *args, **kwargs):
    return 2 * super(type(self), self).forward(*args, **kwargs)


def test_without_a_cache_it_uses_the_applied_plan():
    model, plan = generating()
    with headsink.apply(model, plan):
        found = model.generate(prompt(30), max_new_tokens=50, do_sample=False, custom_generate=decode)
    assert torch.equal(found, generate(do_sample=False))
    with pytest.raises(HeadsinkError, match="inside"):
        model.generate(prompt(5), max_new_tokens=3, custom_generate=decode)


def test_a_batch_without_a_padding_token_ends_like_the_models():
    model = tiny("llama", seed=3)
    model.generation_config.pad_token_id = None
    plan = random_plan(model, 1)
    ids = torch.cat([prompt(30), prompt(30, 1), prompt(30, 2)])
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
    with headsink.apply(model, plan):
        found = [model.generate(ids, **given, eos_token_id=list(range(3, 30)), **loop) for loop in ({}, DECODE)]
    assert torch.equal(*found)
    assert (found[0][:, -9:] == 3).any()  # ended sequences are padded with the first end token


def continued(model, cache, ids, begin, chunk):
    """Return 20 greedy tokens after the rest of `ids`, which is read from column `begin` on in calls of `chunk` tokens."""
    if cache.rows < len(ids):
        cache.batch_repeat_interleave(len(ids))
    for part in ids[:, begin:].split(chunk, 1):
        logits = model(part, **cache_argument(cache)).logits[:, -1]
    for _ in range(20):
        ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
        logits = model(ids[:, -1:], **cache_argument(cache)).logits[:, -1]
    return ids


@pytest.mark.parametrize("rows", [1, 2], ids=["one row for the batch", "as many rows"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_a_sequence_continues_from_its_cache(rows, chunk):
    model, plan = generating()
    ids = prompt(40).repeat(2, 1)
    ids[1, 30:] = prompt(10, 1)
    cache, given = headsink.new_cache(model, plan), {"max_new_tokens": 20, "do_sample": False}
    with headsink.apply(model, plan), torch.no_grad():
        model(ids[:rows, :30], **cache_argument(cache))
        expected = continued(model, copy.deepcopy(cache), ids, 30, chunk or 10)
        copies = [copy.deepcopy(cache) for _ in range(2)]
        found = model.generate(ids, **cache_argument(copies[0]), **given, **DECODE, prefill_chunk_size=chunk)
        after = {"attention_mask": torch.ones(2, 40, dtype=torch.int64), "prefill_chunk_size": chunk}
        rest = model.generate(ids[:, 30:], **cache_argument(copies[1]), **after, **given, **DECODE)
    assert torch.equal(found, expected)
    assert torch.equal(rest, expected[:, 30:])


def test_given_positions_continue():
    model, plan = generating()
    given = {"position_ids": torch.arange(0, 60, 2)[None], "max_new_tokens": 20, "do_sample": False}
    with headsink.apply(model, plan):
        expected = model.generate(prompt(30), **given)
        assert torch.equal(model.generate(prompt(30), **given, **DECODE), expected)
        assert not torch.equal(expected, model.generate(prompt(30), max_new_tokens=20, do_sample=False))


def test_under_autocast_and_in_inference_mode():
    model, _ = generating()
    with torch.inference_mode():
        assert torch.equal(generate(do_sample=False, **DECODE), generate(do_sample=False))
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in refusal(model)
        with pytest.raises(HeadsinkError, match="it does not support"):
            generate(do_sample=False, **DECODE)


def test_a_cache_of_a_model_that_was_converted_is_refused():
    model = tiny("llama").bfloat16()
    plan, ids, cache = random_plan(model, 3), prompt(40), headsink.new_cache(model, random_plan(model, 3))
    with headsink.apply(model, plan), torch.no_grad():
        model(ids[:, :30], **cache_argument(cache))
    model.float()
    with pytest.raises(HeadsinkError, match="this cache does not fit the model"), headsink.apply(model, plan):
        model.generate(ids, **cache_argument(cache), max_new_tokens=3, **DECODE)


ROWS = torch.ones(2, 30, dtype=torch.int64)
RIGHT, LEFT = ROWS.clone(), ROWS.clone()
RIGHT[0, -4:], LEFT[0, :4] = 0, 0


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (RIGHT, "pads on the right; pad on the left"),
        (LEFT[:, 3:], r"its shape is \[2, 27\] and must be \[2, 30\]"),
        (ROWS[:, 3:], r"its shape is \[2, 27\] and must be \[2, 30\]"),
        (LEFT[:1], r"its shape is \[1, 30\] and must be \[2, 30\]"),
        (torch.ones(3, 30, dtype=torch.int64), r"position_ids: \[3, 30\] do not fit 2 sequences with 30 new tokens"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, said):
    model, plan = generating()
    ids, options = prompt(30).repeat(2, 1), {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(HeadsinkError, match=said), headsink.apply(model, plan):
        model.generate(ids, attention_mask=mask, **options, **DECODE)
    with pytest.raises(HeadsinkError, match=said):
        headsink.generate_lossless(model, plan, ids, attention_mask=mask, **options)
    with pytest.raises(HeadsinkError, match="pads on the right"), headsink.apply(model, plan):
        model.generate(ids * RIGHT, **options, **DECODE)  # from which transformers makes the mask


def test_a_prompt_that_is_already_cached_is_refused():
    model, plan = generating()
    cache = headsink.new_cache(model, plan)
    with headsink.apply(model, plan), torch.no_grad():
        model(prompt(30), **cache_argument(cache))
        for tokens in (30, 20):
            with pytest.raises(HeadsinkError, match=f"input_ids: {tokens} tokens, and the cache holds 30 already"):
                model.generate(prompt(30)[:, :tokens], **cache_argument(cache), max_new_tokens=3, **DECODE)


def test_a_padded_cache_needs_its_mask():
    model, plan = generating()
    cache, ids = headsink.new_cache(model, plan), prompt(40).repeat(2, 1)
    with headsink.apply(model, plan), torch.no_grad():
        model(ids[:, :30], attention_mask=LEFT, position_ids=LEFT.cumsum(1) - 1, **cache_argument(cache))
        with pytest.raises(HeadsinkError, match="the cache holds a padded batch; give the mask"):
            model.generate(ids, **cache_argument(cache), max_new_tokens=3, **DECODE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"return_dict_in_generate": True}, "return_dict"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"assistant_model": tiny("llama")}, "assisted generation"),
        ({"use_cache": False}, "use_cache=False"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 5, 48)}, "inputs_embeds"),
    ],
)
def test_unsupported_options_are_refused(options, said):
    model, plan = generating()
    given = {"input_ids": prompt(5), **cache_argument(headsink.new_cache(model, plan)), "max_new_tokens": 3} | options
    with pytest.raises(HeadsinkError, match=said), headsink.apply(model, plan):
        model.generate(**given, custom_generate=decode)

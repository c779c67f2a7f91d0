"""The compiled decode step gives the logits, cache and text of the model under the same plan."""

import copy
from functools import cache

import pytest
import torch
import transformers
from architectures import make
from families import FAMILIES, SHAPE, tiny
from plans import random_plan

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.decoding.cpu import AHEAD
from headsink.decoding.fields import NormKind, Scores
from headsink.decoding.kernel import run as kernel
from headsink.decoding.parts import parts_of
from headsink.decoding.step import open_decoder, prepare, refusal
from headsink.models.transformers_names import cache_argument


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
    with headsink.apply(model, plan, compiled=False), torch.no_grad():
        for one in (ours, theirs):
            model(ids[:, :length], **cache_argument(one))
        with open_decoder(model, ours) as step:
            for token in ids[0, length:].tolist():
                found = step.run(torch.tensor([token]))
                expected = model(torch.tensor([[token]]), **cache_argument(theirs)).logits[:, -1]
                torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    same_state(ours, theirs)
    with headsink.apply(model, plan, compiled=False), torch.no_grad():  # the model continues from it
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
    with headsink.apply(model, plan, compiled=False), torch.no_grad():

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
        with headsink.apply(model, plan, compiled=False):
            model(ids[:, :40], **cache_argument(ours))
            model(ids[:, :40], **cache_argument(theirs))
        with headsink.apply(exact, Plan.full(exact), compiled=False):
            exact(ids[:, :40], **cache_argument(truth))
        errors = torch.zeros(2)
        with open_decoder(model, ours) as step:
            for token in ids[0, 40:].tolist():
                found = step.run(torch.tensor([token]))
                one = torch.tensor([[token]])
                with headsink.apply(model, plan, compiled=False):
                    expected = model(one, **cache_argument(theirs)).logits[:, -1].float()
                with headsink.apply(exact, Plan.full(exact), compiled=False):
                    true = exact(one, **cache_argument(truth)).logits[:, -1].float()
                errors += torch.stack([(found - true).norm(), (expected - true).norm()])
    assert errors[0] < errors[1] < 0.1 * 20 * true.norm()


def test_a_compressed_cache_keeps_growing():
    model = tiny("llama")
    plan, ids = random_plan(model, 5), prompt(200)
    with torch.no_grad():
        caches = [headsink.compress(model, plan, ids[:, :100]) for _ in range(2)]
        with headsink.apply(model, plan, compiled=False), open_decoder(model, caches[0]) as step:
            for token in ids[0, 100:].tolist():
                expected = model(torch.tensor([[token]]), **cache_argument(caches[1])).logits[:, -1]
                torch.testing.assert_close(step.run(torch.tensor([token])), expected, rtol=2e-4, atol=2e-4)
    same_state(*caches)


def test_steps_and_forward_passes_alternate():
    """Each grows buffers whose addresses the other has read."""
    model = tiny("llama")
    plan, ids = Plan.of(model, [[Pattern(), Pattern(2, 0, 300)]] * 3), prompt(160)
    ours, theirs = headsink.new_cache(model, plan), headsink.new_cache(model, plan)
    with headsink.apply(model, plan, compiled=False), torch.no_grad():
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_kernels_are_the_ones_called(dtype):
    model, plan = tiny("llama", dtype=dtype), Plan.full(tiny("llama"))
    prepare(model)
    compiled = list(kernel.signatures)
    cache = headsink.new_cache(model, plan)
    with headsink.apply(model, plan, compiled=False), torch.no_grad():
        model(prompt(5), **cache_argument(cache))
        with open_decoder(model, cache) as step:
            step.run(torch.tensor([7]))
    assert kernel.signatures == compiled


def test_an_error_between_steps_leaves_the_cache_intact():
    model, plan = generating()
    ids, cache = prompt(30), headsink.new_cache(model, plan)
    with headsink.apply(model, plan, compiled=False), torch.no_grad():
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
    with pytest.raises(HeadsinkError, match="compiled:"), headsink.apply(model, Plan.full(model), compiled=True):
        pass


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

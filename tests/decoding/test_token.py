"""Inside `apply` the compiled decode step takes the place of passes of one token, where the caller sees no difference."""

import copy
import inspect
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from families import FAMILIES, tiny
from peft import LoraConfig, inject_adapter_in_model
from plans import QUALITY, random_plan

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.decoding.cpu import Decoder
from headsink.decoding.step import refusal
from headsink.models.transformers_names import cache_argument
from headsink.plan.schema import Quality

NEW = 40


@pytest.fixture
def steps(monkeypatch):
    """One entry for each token that the compiled step has decoded."""
    found, run = [], Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda *given: found.append(1) or run(*given))
    return found


@pytest.fixture(scope="module")
def made():
    model = tiny("llama", seed=3)
    assert refusal(model) is None  # compares the step with the model
    return model, random_plan(model, 1)


def prompts(rows=1, tokens=30):
    return torch.randint(3, 211, (rows, tokens), generator=torch.Generator().manual_seed(rows))


def text(model, plan, ids, compiled, **options):
    torch.manual_seed(0)
    with headsink.apply(model, plan, compiled=compiled):
        return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options})


def tokens(model, cache, ids, **given):
    """Return the logits of tokens that are given one by one, [sequences, tokens, vocabulary]."""
    with torch.no_grad():
        return torch.cat([model(one, **cache_argument(cache), **given).logits for one in ids.split(1, 1)], 1)


OPTIONS = [
    {},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"do_sample": True, "num_return_sequences": 3},
    {"num_beams": 3, "length_penalty": 2.0},
    {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
    {"eos_token_id": list(range(3, 30))},
    {"prefill_chunk_size": 7},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", [1, 3])
def test_generate_gives_the_same_text(made, steps, options, rows):
    ids = prompts(rows)
    mask = torch.ones_like(ids)
    if rows > 1 and "prefill_chunk_size" not in options:
        mask[0, :20], mask[2, :1] = 0, 0
    expected = text(*made, ids, False, attention_mask=mask, **options)
    assert not steps
    assert torch.equal(text(*made, ids, None, attention_mask=mask, **options), expected)
    assert len(steps) == expected.shape[1] - 31  # the first token comes with the prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, steps, case_seed):
    model = tiny(family, seed=case_seed % 5)
    assert refusal(model) is None
    plan, ids = random_plan(model, case_seed), prompts(2, 41)
    steps.clear()
    assert torch.equal(text(model, plan, ids, None), text(model, plan, ids, False))
    assert len(steps) == NEW - 1


def test_scores_and_states_that_a_caller_asks_for(made, steps):
    ids = prompts()
    options = {"return_dict_in_generate": True, "output_scores": True}
    found, expected = (text(*made, ids, compiled, **options) for compiled in (None, False))
    assert len(steps) == NEW - 1
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=2e-4, atol=2e-4)
    steps.clear()
    states = text(*made, ids, None, output_hidden_states=True, **options).hidden_states
    assert len(states) == NEW
    assert states[5][1].shape == (1, 1, 48)
    assert not steps  # the model computes states
    text(*made, ids, None)
    assert len(steps) == NEW - 1  # transformers' hooks for states, which stay on the layers, are no obstacle


def test_a_loop_of_forward_passes(made, steps):
    model, plan = made
    ids = prompts(2, 60)
    found = []
    for compiled in (None, False):
        cache = headsink.new_cache(model, plan)
        with headsink.apply(model, plan, compiled=compiled):
            with torch.no_grad():
                model(ids[:, :30], **cache_argument(cache))
            found.append(tokens(model, cache, ids[:, 30:]))
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-4)
    assert len(steps) == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_the_models(dtype, steps):
    model = tiny("gpt-oss", dtype=dtype)
    assert refusal(model) is None
    steps.clear()
    plan, ids, found = random_plan(model, 1), prompts(), []
    for compiled in (None, False):
        with headsink.apply(model, plan, compiled=compiled), torch.no_grad():
            first = model(ids, logits_to_keep=1)
            found.append(model(ids[:, :1], **cache_argument(first.past_key_values)))
    one, other = found
    assert len(steps) == 1
    assert type(one) is type(other)
    assert (one.logits.dtype, one.logits.shape) == (other.logits.dtype, other.logits.shape) == (dtype, (1, 1, 211))
    assert {name for name, value in one.items() if value is not None} <= set(other)


def hook(model):
    return model.model.layers[1].mlp.register_forward_hook(lambda module, given, output: output * 0)


def replaced(model):
    model.model.layers[1].mlp.forward = lambda states: states * 0


def trained(model):
    model.train()


def global_hook(model):
    mlp = model.model.layers[1].mlp
    return torch.nn.modules.module.register_module_forward_hook(
        lambda m, given, output: output * 0 if m is mlp else None
    )


def adapter(model):
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(target_modules=["v_proj"], init_lora_weights=False), model)


def new_weight(model):
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(64, 48) / 10)


def new_memory(model):
    model.model.layers[0].input_layernorm.weight.data = torch.full((48,), 0.3)


# what is done to a model, and whether a step can decode it then
CHANGES = {hook: False, replaced: False, trained: False, global_hook: False, adapter: False}
CHANGES |= {new_weight: True, new_memory: True}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_is_changed_between_tokens(change, steps):
    model = tiny("llama", seed=3)
    plan, ids, found = random_plan(model, 1), prompts(1, 50), []
    for compiled in (False, None):
        own = copy.deepcopy(model)
        assert refusal(own) is None
        steps.clear()
        with headsink.apply(own, plan, compiled=compiled):
            cache = headsink.new_cache(own, plan)
            with torch.no_grad():
                own(ids[:, :30], **cache_argument(cache))
            before = tokens(own, cache, ids[:, 30:40])
            handle = change(own)
            after = tokens(own, cache, ids[:, 40:])
            if hasattr(handle, "remove"):
                handle.remove()
        found.append(torch.cat([before, after], 1))
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-4)
    assert len(steps) == (20 if CHANGES[change] else 10)


def test_with_gradients_and_under_autocast_the_model_runs_itself(made, steps):
    model, plan = made
    with headsink.apply(model, plan):
        first = model(prompts())
        loss = model(prompts()[:, :1], **cache_argument(first.past_key_values)).logits.sum()
    assert torch.autograd.grad(loss, model.lm_head.weight)[0].abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        text(*made, prompts(), None)
    assert not steps


def test_inference_mode(made, steps):
    with torch.inference_mode():
        assert torch.equal(text(*made, prompts(), None), text(*made, prompts(), False))
    assert steps


def test_a_compiled_model(made, steps):
    model, plan = made
    compiled = torch.compile(model, backend="eager")
    with headsink.apply(compiled, plan), torch.no_grad():
        cache = headsink.new_cache(model, plan)
        compiled(prompts(), **cache_argument(cache))
        found = compiled(prompts()[:, :1], **cache_argument(cache)).logits
    with headsink.apply(model, plan, compiled=False), torch.no_grad():
        cache = headsink.new_cache(model, plan)
        model(prompts(), **cache_argument(cache))
        expected = model(prompts()[:, :1], **cache_argument(cache)).logits
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert cache.get_seq_length() == 31
    assert len(steps) == 1


def test_steps_passes_and_changes_of_the_cache_alternate(steps):
    model = tiny("qwen2", seed=1)
    assert refusal(model) is None
    steps.clear()
    plan = random_plan(model, 2, lambda rng: Pattern() if rng.random() < 0.5 else Pattern(2, 5, 9))
    ids, found = prompts(2, 90), []
    for compiled in (None, False):
        with headsink.apply(model, plan, compiled=compiled):
            cache, parts = headsink.new_cache(model, plan), []
            with torch.no_grad():
                model(ids[:, :30], **cache_argument(cache))
                parts.append(tokens(model, cache, ids[:, 30:40]))
                parts.append(model(ids[:, 40:45], **cache_argument(cache)).logits)
                parts.append(tokens(model, cache, ids[:, 45:50]))
                cache.reorder_cache(torch.tensor([1, 1]))
                parts.append(tokens(model, cache, ids[:, 50:60]))
                cache.batch_repeat_interleave(2)
                parts.append(tokens(model, cache, ids.repeat_interleave(2, 0)[:, 60:70])[::2])
                kept = copy.deepcopy(cache)
                parts.append(tokens(model, kept, ids.repeat_interleave(2, 0)[:, 70:80])[::2])
                cache.batch_select_indices(torch.tensor([0, 2]))
                parts.append(tokens(model, cache, ids[:, 70:80]))
            found.append(torch.cat(parts, 1))
    torch.testing.assert_close(*found, rtol=3e-4, atol=3e-4)
    assert len(steps) == 55


def test_a_cache_that_is_cropped_and_grows_again(steps):
    model = tiny("llama")
    plan, ids, found = random_plan(model, 2, lambda _: Pattern(2, 0, 100)), prompts(1, 60), []
    for compiled in (None, False):
        with headsink.apply(model, plan, compiled=compiled), torch.no_grad():
            cache = headsink.new_cache(model, plan)
            model(ids[:, :30], **cache_argument(cache))
            tokens(model, cache, ids[:, 30:40])
            cache.crop(-10)
            parts = [model(ids[:, 45:50], **cache_argument(cache)).logits]
            parts.append(tokens(model, cache, ids[:, 50:55]))  # as many tokens as the step has seen before
            found.append(torch.cat(parts, 1))
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-4)


def test_positions_of_the_caller(made, steps):
    given = {"position_ids": torch.arange(0, 60, 2)[None], "max_new_tokens": 20}
    expected = text(*made, prompts(), False, **given)
    assert torch.equal(text(*made, prompts(), None, **given), expected)
    assert len(steps) == 19
    assert not torch.equal(expected, text(*made, prompts(), None, max_new_tokens=20))


def test_an_exact_plan_of_full_heads_gives_the_models_own_logits(made, steps):
    model, _ = made
    ids, full = prompts(), Plan.full(model)
    cache, plain = headsink.new_cache(model, full), transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **cache_argument(plain))
        expected = tokens(model, plain, ids[:, :5])
        with headsink.apply(model, full):
            model(ids, **cache_argument(cache))
            assert torch.equal(tokens(model, cache, ids[:, :5]), expected)
        assert not steps
        with headsink.apply(model, full, exact=False):
            cache = headsink.new_cache(model, full, exact=False)
            model(ids, **cache_argument(cache))
            torch.testing.assert_close(tokens(model, cache, ids[:, :5]), expected, rtol=2e-4, atol=2e-4)
        assert len(steps) == 5


def test_drafts_are_cropped_by_the_models_passes(made, steps):
    ids = prompts(1, 12).repeat(1, 3)
    expected = text(*made, ids, False)
    assert torch.equal(text(*made, ids, None, prompt_lookup_num_tokens=3), expected)
    assert not steps


def test_threads_do_not_disturb_each_other(made, steps):
    expected = text(*made, prompts(), False)
    model, plan = made

    def one():
        return model.generate(prompts(), max_new_tokens=NEW, do_sample=False, pad_token_id=0)

    with headsink.apply(model, plan), ThreadPoolExecutor(4) as pool:
        found = [pool.submit(one) for _ in range(8)]
        assert all(torch.equal(each.result(), expected) for each in found)
    assert len(steps) == 8 * (NEW - 1)


def test_a_sequence_beyond_the_verified_length_warns_once(made, steps):
    model, plan = made
    plan = plan.model_copy(update={"quality": (Quality(**{**QUALITY, "context": 40}),)})
    with pytest.warns(UserWarning, match="has 41 tokens") as caught:
        text(model, plan, prompts(), None)
    assert len([one for one in caught if "tokens, the plan's" in str(one.message)]) == 1
    assert steps


def test_a_cache_is_freed_with_its_step(made):
    model, plan = made
    cache = headsink.new_cache(model, plan)
    with headsink.apply(model, plan):
        with torch.no_grad():
            model(prompts(), **cache_argument(cache))
            tokens(model, cache, prompts()[:, :3])
        alive = weakref.ref(cache.layers[0].groups[0].keys)
        del cache
        assert alive() is None  # without the collector of cycles


def test_the_block_leaves_nothing_behind(made):
    model, plan = made
    before, signature = model.forward, inspect.signature(model.forward)
    with headsink.apply(model, plan), headsink.apply(model, plan):
        assert inspect.signature(model.forward) == signature
    assert "forward" not in model.__dict__
    assert model.forward == before
    model.forward = lambda *args, **options: before(*args, **options)  # as accelerate does
    wrapper = model.forward
    try:
        with headsink.apply(model, plan):
            model(prompts())
        assert model.forward is wrapper
    finally:
        del model.forward


def test_a_model_without_a_step_is_asked_once_for_a_cache(made, monkeypatch):
    model, plan = made
    asked = []
    monkeypatch.setattr("headsink.decoding.token.refusal", lambda *given: asked.append(1) or "some part is unknown")
    assert torch.equal(text(model, plan, prompts(), None), text(model, plan, prompts(), False))
    assert len(asked) == 1


def test_the_last_logits_by_index(made):
    model, plan = made
    with headsink.apply(model, plan), torch.no_grad():
        cache = headsink.new_cache(model, plan)
        model(prompts(), **cache_argument(cache))
        output = model(prompts()[:, :1], **cache_argument(cache), logits_to_keep=torch.tensor([0, 0]))
    assert output.logits.shape == (1, 2, 211)


@pytest.mark.parametrize("change", [hook, trained], ids=lambda change: change.__name__)
def test_a_step_that_is_required_names_what_prevents_it(change):
    model = tiny("llama")
    change(model)
    with pytest.raises(HeadsinkError, match="compiled: it"), headsink.apply(model, Plan.full(model), compiled=True):
        pass

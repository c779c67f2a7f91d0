"""A plan applies to a model in every thread, and a forward pass that does not follow it raises."""

import asyncio
import contextvars
import copy
import inspect
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import tiny
from plans import random_plan
from reference import masked, reference_logits
from transformers import DynamicCache, TextIteratorStreamer
from transformers.models.llama import modeling_llama

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.cache.cache import PlanCache
from headsink.census.head_statistics import Thresholds
from headsink.census.run import _read as census_pass
from headsink.eviction.scorers import LINEAR
from headsink.models import transformers_names
from headsink.models.spec import describe
from headsink.models.transformers_names import CACHE, cache_argument, returned_cache

TOKENS = 12


@pytest.fixture
def model():
    return tiny("llama")


def prompt(batch=2, length=40):
    return torch.randint(3, 211, (batch, length), generator=torch.Generator().manual_seed(5))


def generated(model, ids, **options):
    return model.generate(ids, max_new_tokens=TOKENS, do_sample=False, **options)


def expected(plan, ids, segments=None):
    """Return the greedy tokens of the reference, which masks every head over the whole text without a cache.

    segments: those of the prompt; None: it is one segment.
    """
    twin, segments = tiny("llama"), segments or [ids.shape[1]]
    for step in range(TOKENS):
        logits = reference_logits(twin, plan, ids, None, segments + [1] * step)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


# the guard


def drop_the_cache(model, monkeypatch):
    whole = model.model.forward

    def forward(*args, **kwargs):
        return whole(*args, **{name: value for name, value in kwargs.items() if name not in transformers_names.NAMES})

    monkeypatch.setattr(model.model, "forward", forward)


def set_another_attention(model, monkeypatch):
    model.set_attn_implementation("sdpa")


def replace_the_attention_of_a_layer(model, monkeypatch):
    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))


def pass_the_cache_by(model, monkeypatch):
    """Replace a layer by one with its own key storage."""
    own, whole = DynamicCache(), model.model.layers[2].self_attn.forward
    monkeypatch.setattr(
        model.model.layers[2].self_attn, "forward", lambda *a, **k: whole(*a, **(k | cache_argument(own)))
    )


def hand_the_cache_on_in_another_way(model, monkeypatch):
    """A possible new transformers: the argument that headsink fills has another name."""
    monkeypatch.setattr("headsink.attention.passes.with_cache", lambda module, arguments, cache: arguments)


BROKEN = {
    drop_the_cache: "layer 0: it attended without the plan's cache",
    set_another_attention: "attention was set to 'sdpa' inside",
    replace_the_attention_of_a_layer: "layer 1: it did not attend through the plan.*its attention was replaced",
    pass_the_cache_by: "layer 2: it attended without the plan's cache",
    hand_the_cache_on_in_another_way: "LlamaModel was called with another KV cache than the plan's",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda how: how.__name__)
@torch.no_grad()
def test_a_pass_that_does_not_follow_the_plan_raises(model, broken, monkeypatch):
    plan, ids = random_plan(model, 1), prompt()
    with headsink.apply(model, plan):
        broken(model, monkeypatch)
        with pytest.raises(HeadsinkError, match=BROKEN[broken]):
            model(ids)
        if broken is hand_the_cache_on_in_another_way:  # `generate` creates a cache, which is converted to the plan's
            assert torch.equal(generated(model, ids), expected(plan, ids))
        else:
            with pytest.raises(HeadsinkError, match=BROKEN[broken]):
                generated(model, ids)
    monkeypatch.undo()
    with headsink.apply(model, plan):
        assert torch.equal(generated(model, ids), expected(plan, ids))


@pytest.mark.parametrize("broken", [drop_the_cache, replace_the_attention_of_a_layer], ids=lambda how: how.__name__)
def test_compiled_and_lossless_raise_as_well(model, broken, monkeypatch):
    plan, ids = random_plan(model, 1), prompt()
    broken(model, monkeypatch)
    said = r"layer [01]: it|its layers have hooks or another forward"
    with pytest.raises(HeadsinkError, match=said), headsink.apply(model, plan, compiled=True):
        generated(model, ids)
    with pytest.raises(HeadsinkError, match=r"layer [01]: it"):
        headsink.generate_lossless(model, plan, ids, max_new_tokens=3)


def test_a_census_without_observed_attention_raises(model, monkeypatch):
    replace_the_attention_of_a_layer(model, monkeypatch)
    shape = describe(model)
    with pytest.raises(HeadsinkError, match="the attention of layer 1 was not seen"):
        census_pass(model, shape, prompt(1)[0].tolist(), [40], Thresholds(), 16, lambda: None)


@torch.no_grad()
def test_calling_submodules_alone_raises(model):
    plan, ids = random_plan(model, 1), prompt()
    hidden = model.get_input_embeddings()(ids)
    places = model.model.rotary_emb(hidden, torch.arange(40)[None])
    with headsink.apply(model, plan):
        for call in (
            lambda: model.model.forward(ids),
            lambda: model.model.layers[0](hidden, position_embeddings=places),
            lambda: model.model.layers[0].self_attn(hidden, position_embeddings=places, attention_mask=None),
        ):
            with pytest.raises(HeadsinkError, match="layer 0: it attended without the plan's cache"):
                call()
        found = model.model(ids).last_hidden_state  # which is the decoder
        torch.testing.assert_close(model.lm_head(found), reference_logits(tiny("llama"), plan, ids), rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_follows_the_plan(model):
    plan, ids = random_plan(model, 1), prompt()
    compiled = torch.compile(model, backend="eager")
    with headsink.apply(model, plan):
        for tokens in (40, 39, 23):  # with the second one torch.compile makes the length a symbol
            expected = reference_logits(tiny("llama"), plan, ids[:, :tokens])
            torch.testing.assert_close(compiled(ids[:, :tokens]).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("work", [copy.deepcopy, pickle.dumps])
def test_a_model_cannot_be_copied_inside_a_block(model, work):
    with headsink.apply(model, Plan.full(model)), pytest.raises(HeadsinkError, match="outside the block"):
        work(model)
    assert work(model)


# threads


def in_a_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def test_a_streaming_thread_runs_under_the_plan(model, tokenizer):
    plan, ids = random_plan(model, 1), prompt(1)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {"max_new_tokens": TOKENS, "do_sample": False, "streamer": streamer}
    with headsink.apply(model, plan):
        thread = threading.Thread(target=model.generate, args=(ids,), kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == tokenizer.decode(expected(plan, ids)[0, 40:])


def test_executors_and_event_loops_run_under_the_plan(model):
    plan, ids = random_plan(model, 1), prompt()

    async def serve():
        with headsink.apply(model, plan):
            return await asyncio.gather(
                asyncio.get_running_loop().run_in_executor(None, generated, model, ids),
                asyncio.to_thread(generated, model, ids),
            )

    for found in asyncio.run(serve()):
        assert torch.equal(found, expected(plan, ids))


@pytest.mark.slow
def test_a_thread_with_its_own_apply_block_has_its_plan(model):
    plans, ids = [random_plan(model, seed) for seed in (1, 2)], prompt()

    def own():
        with headsink.apply(model, plans[1]):
            return generated(model, ids)

    with headsink.apply(model, plans[0]):
        assert torch.equal(in_a_thread(own), expected(plans[1], ids))
        assert torch.equal(generated(model, ids), expected(plans[0], ids))
        assert torch.equal(own(), expected(plans[1], ids))
        assert torch.equal(generated(model, ids), expected(plans[0], ids))


def test_a_thread_between_two_plans_raises(model):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with headsink.apply(model, random_plan(model, 2)):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with headsink.apply(model, random_plan(model, 1)):
        thread.start()
        inside.wait()
        with ThreadPoolExecutor(1) as pool, pytest.raises(HeadsinkError, match="several plans are applied"):
            pool.submit(generated, model, prompt()).result()
        leave.set()
        thread.join()
        assert in_a_thread(lambda: generated(model, prompt())) is not None


def stream(model, plan, ids):
    """Stream texts and tokens as a web application does: a generator that enters the block."""
    with headsink.apply(model, plan):
        for _ in range(2):
            cache, new = None, ids
            for _ in range(TOKENS):
                with torch.no_grad():  # not around a yield, because it is a setting of the thread
                    read = model(new, **cache_argument(cache))
                cache, new = returned_cache(read), read.logits[:, -1:].argmax(-1)
                yield new


@pytest.mark.parametrize("where", ["threads", "contexts"])
def test_generators_can_be_resumed_anywhere_and_interleaved(model, where):
    ids, plans = prompt(), [random_plan(model, seed) for seed in (1, 2)]
    both, found = [stream(model, plan, ids) for plan in plans], [[], []]
    for _ in range(2 * TOKENS):
        for generator, tokens in zip(both, found, strict=True):
            if where == "threads":
                tokens.append(in_a_thread(lambda generator=generator: next(generator)))
            else:
                tokens.append(contextvars.copy_context().run(next, generator))
    for generator in both:
        assert in_a_thread(lambda generator=generator: next(generator, "over")) == "over"
    for plan, tokens in zip(plans, found, strict=True):
        text = torch.cat([ids, *tokens[:TOKENS]], 1), torch.cat([ids, *tokens[TOKENS:]], 1)
        assert torch.equal(text[0], expected(plan, ids))
        assert torch.equal(text[1], text[0])
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks
    assert not model.model._forward_pre_hooks


def test_a_dropped_generator_leaves_no_plan_applied(model):
    generator = stream(model, random_plan(model, 1), prompt())
    next(generator)
    del generator
    assert model.config._attn_implementation == "sdpa"
    assert not model.model._forward_pre_hooks


def test_a_thread_whose_block_is_left_raises(model):
    """The current pass finishes under the plan; the next one raises."""
    plan, ids, streamer = random_plan(model, 1), prompt(1), Paced()
    errors = []

    def work():
        try:
            model.generate(ids, max_new_tokens=500, do_sample=False, streamer=streamer)
        except HeadsinkError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    with headsink.apply(model, plan):
        thread.start()
        streamer.began.wait()
    streamer.go.set()
    thread.join()
    assert len(errors) == 1
    assert "leave the block only when all threads that use the model are done" in errors[0]
    assert model.config._attn_implementation == "sdpa"


class Paced:
    """A streamer that waits after the first token."""

    def __init__(self):
        self.began, self.go, self.seen = threading.Event(), threading.Event(), 0

    def put(self, value):
        self.seen += 1
        if self.seen == 2:
            self.began.set()
            self.go.wait()

    def end(self):
        pass


def test_the_cache_of_an_interrupted_pass_is_refused(model, monkeypatch):
    """After ctrl-C in a pass, torch runs no hooks and the cache is partly filled."""
    plan, ids, cache = random_plan(model, 1), prompt(), headsink.new_cache(model, random_plan(model, 1))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with headsink.apply(model, plan):
        monkeypatch.setattr(model.model.layers[1].mlp, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(ids, **cache_argument(cache))
        monkeypatch.undo()
        assert torch.equal(generated(model, ids), expected(plan, ids))
        with pytest.raises(HeadsinkError, match="its layers hold 0 to 40 tokens"):
            model(ids, **cache_argument(cache))
    assert model.config._attn_implementation == "sdpa"


# caches


@torch.no_grad()
def test_an_empty_given_cache_is_filled(model):
    plan, ids, cache = random_plan(model, 1), prompt(), DynamicCache(config=model.config)
    new, found = ids, [ids]
    with headsink.apply(model, plan):
        for _ in range(TOKENS):
            new = model(new, **cache_argument(cache)).logits[:, -1:].argmax(-1)
            found.append(new)
    assert torch.equal(torch.cat(found, 1), expected(plan, ids))
    assert isinstance(cache, PlanCache)
    assert cache.get_seq_length() == 40 + TOKENS - 1


@pytest.mark.parametrize("how", ["argument", "generation_config", "model.config"])
def test_without_a_cache_every_step_recomputes_the_sequence(model, how):
    plan, ids = random_plan(model, 1), prompt()
    if how == "generation_config":
        model.generation_config.use_cache = False
    if how == "model.config":
        model.config.use_cache = False
    options, text, twin = {"use_cache": False} if how == "argument" else {}, ids, tiny("llama")
    for _ in range(TOKENS):  # each time the whole text is one segment
        text = torch.cat([text, reference_logits(twin, plan, text)[:, -1:].argmax(-1)], 1)
    with headsink.apply(model, plan):
        found = generated(model, ids, **options)
        cached = how == "model.config" and torch.equal(found, expected(plan, ids))  # `generate` may not follow that
        assert torch.equal(found, text) or cached
        if how != "generation_config":
            assert returned_cache(model(ids, **options)) is None


@torch.no_grad()
def test_a_cache_of_one_row_is_repeated_for_a_batch(model):
    plan, before, after = random_plan(model, 1), prompt(1), prompt(3, 5)
    cache = headsink.new_cache(model, plan)
    with headsink.apply(model, plan):
        model(before, **cache_argument(cache))
        text = torch.cat([before.expand(3, -1), after], 1)
        assert torch.equal(generated(model, text, **cache_argument(cache)), expected(plan, text, [40, 5]))


def other_shape():
    shape = copy.deepcopy(tiny("llama").config)
    shape.head_dim = 24
    return type(tiny("llama"))(shape).eval()


MISFITS = {
    "fewer rows": (lambda m: m, 1, "holds 2 sequences and the model was given 1"),
    "more rows": (lambda m: m, 3, "holds 2 sequences and the model was given 3"),
    "another dtype": (lambda m: m.bfloat16(), 2, "dtype are torch.bfloat16 and must be torch.float32"),
    "other weights": (lambda m: tiny("llama", seed=1), 2, "this cache was made for another model"),
    "another head size": (lambda m: other_shape(), 2, "this cache was made for another model"),
    "fewer layers": (lambda m: tiny("qwen2"), 2, "this cache was made for another model"),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("tokens", [1, 7])
@torch.no_grad()
def test_a_cache_that_does_not_fit_is_refused_before_a_kernel_sees_it(model, misfit, tokens):
    change, rows, message = MISFITS[misfit]
    plan = random_plan(model, 1)
    cache = headsink.new_cache(model, plan)
    with headsink.apply(model, plan):
        model(prompt(), **cache_argument(cache))
    other = change(model)
    theirs = plan if other is model else random_plan(other, 1)
    with headsink.apply(other, theirs), pytest.raises(HeadsinkError, match=message):
        other(prompt(rows, tokens), **cache_argument(cache))


@torch.no_grad()
def test_a_crop_that_is_refused_changes_nothing(model):
    patterns = [[Pattern(), Pattern()], [Pattern(), Pattern(2, 0, 8)], [Pattern(), Pattern()]]
    plan, ids, cache = Plan.of(model, patterns), prompt(), headsink.new_cache(model, Plan.of(model, patterns))
    with headsink.apply(model, plan):
        model(ids, **cache_argument(cache))
        with pytest.raises(HeadsinkError, match="cannot take back 3 tokens"):
            cache.crop(-3)
        assert {layer.get_seq_length() for layer in cache.layers} == {40}
        found = model(ids[:, :4], **cache_argument(cache)).logits
    whole = torch.cat([ids, ids[:, :4]], 1)
    torch.testing.assert_close(
        found, reference_logits(tiny("llama"), plan, whole, None, [40, 4])[:, 40:], rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_a_cache_outlives_inference_mode_and_pickling(model):
    plan, ids = random_plan(model, 1), prompt()
    whole = reference_logits(tiny("llama"), plan, torch.cat([ids] * 2, 1), None, [40, 30, 1, 9])[:, 40:]
    with headsink.apply(model, plan):
        with torch.inference_mode():
            cache = returned_cache(model(ids))
            model(ids[:, :1], **cache_argument(copy.deepcopy(cache)))
        for held in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):  # noqa: S301, our own
            found = [model(part, **cache_argument(held)).logits for part in ids.split([30, 1, 9], 1)]
            torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_autocast_attends_in_its_dtype(model):
    plan, ids = random_plan(model, 1), prompt()
    with headsink.apply(model, plan), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = returned_cache(read := model(ids))
        one = model(ids[:, :1], **cache_argument(cache)).logits
    assert cache.layers[0].groups[0].keys.dtype == torch.bfloat16
    whole = reference_logits(tiny("llama"), plan, torch.cat([ids, ids[:, :1]], 1), None, 40)
    for found, exact in ((read.logits, whole[:, :40]), (one, whole[:, 40:])):
        assert (found.float() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_gradients_reach_every_weight_under_a_plan(model, prefill):
    """Gradients equal those of the reference, for a prompt of several tokens and top-k keys."""
    plan = Plan.of(model, [[Pattern(1, 5, 8), Pattern()]] * 3, random_scores(model))
    ids, twin = prompt(), tiny("llama")
    with headsink.apply(model, plan, prefill=prefill):
        model(ids, labels=ids).loss.backward()
    with masked(twin, plan, segments=[40] if prefill == "dense" else [1] * 40):
        twin(ids, labels=ids, use_cache=False).loss.backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5)


def random_scores(model):
    shape = describe(model)
    return torch.randn(shape.layers, shape.kv_heads, LINEAR.n_features(shape.head_dim))


# refusals

REFUSED = {
    "output_attentions": ({"output_attentions": True}, "output_attentions: the weights are never computed"),
    "packed documents": (
        {"position_ids": torch.cat([torch.arange(20)] * 2)[None].expand(2, -1), "use_cache": False},
        "position_ids start again",
    ),
    "a long mask": ({"attention_mask": torch.ones(2, 41)}, r"its shape is \[2, 41\] and must be \[2, 40\]"),
    "a mask of another batch": ({"attention_mask": torch.ones(3, 40)}, r"its shape is \[3, 40\] and must be \[2, 40\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_calls_incompatible_with_a_plan_are_refused(model, what):
    given, message = REFUSED[what]
    with headsink.apply(model, random_plan(model, 1)), pytest.raises(HeadsinkError, match=message):
        model(prompt(), **given)


def test_gradient_checkpointing_is_refused(model):
    model.gradient_checkpointing_enable()
    with headsink.apply(model.train(), Plan.full(model)), pytest.raises(HeadsinkError, match="gradient checkpointing"):
        model(prompt(), labels=prompt())


def test_no_tokens_are_refused(model):
    with headsink.apply(model, Plan.full(model)), pytest.raises(HeadsinkError, match="without tokens"):
        model(prompt()[:, :0])


def test_models_have_the_argument_that_is_filled():
    assert CACHE in inspect.signature(modeling_llama.LlamaModel.forward).parameters


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_a_frozen_cache_evicts_nothing_and_does_not_warn(model, prefill):
    plan, ids = random_plan(model, 1), prompt()
    cache, full = headsink.new_cache(model, plan, prefill=prefill), tiny("llama")
    cache.freeze()
    with headsink.apply(model, plan), torch.no_grad(), warnings.catch_warnings(action="error"):
        found = [model(part, **cache_argument(cache)).logits for part in ids.split([30, 1, 9], 1)]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(found, 1), full(ids).logits, rtol=0, atol=1e-5)


def test_rows_repeated_without_gradients_can_continue_with_them(model):
    plan, ids, cache = random_plan(model, 1), prompt(1), headsink.new_cache(model, random_plan(model, 1))
    with headsink.apply(model, plan):
        with torch.no_grad():
            model(ids, **cache_argument(cache))
            cache.batch_repeat_interleave(2)
        found = model(prompt(2, 5), **cache_argument(cache)).logits
    text = torch.cat([ids.expand(2, -1), prompt(2, 5)], 1)
    torch.testing.assert_close(
        found, reference_logits(tiny("llama"), plan, text, None, [40, 5])[:, 40:], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
@pytest.mark.parametrize("trained", ["k_proj", "v_proj"])
def test_gradients_of_keys_or_values_alone_are_not_lost(model, trained, prefill):
    plan, ids, twin = random_plan(model, 1), prompt(), tiny("llama")
    for one in (model, twin):
        one.requires_grad_(False)
        getattr(one.model.layers[0].self_attn, trained).weight.requires_grad_()
    with headsink.apply(model, plan, prefill=prefill):
        model(ids, labels=ids).loss.backward()
    with masked(twin, plan, segments=[40] if prefill == "dense" else [1] * 40):
        twin(ids, labels=ids, use_cache=False).loss.backward()
    found, expected_ = (getattr(one.model.layers[0].self_attn, trained).weight.grad for one in (model, twin))
    torch.testing.assert_close(found, expected_, rtol=0, atol=1e-5)

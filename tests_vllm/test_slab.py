"""Plans with top-k keys: vLLM gives the log-probabilities of the reference, whatever shares the batch, and frees every block."""

import random
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from statistics import mean

import expected
import pytest
import reference
import tiny
import torch
from conftest import fp8
from plans import random_plan
from vllm import SamplingParams

from headsink import HeadsinkError, Pattern
from headsink.attention import reference as reference_module
from headsink.serving.vllm.slab import EVICT_EVERY, Slab, blocks_for, widen

BOUND = 1e-4
CONTEXT = 1024
ASK_ALL = SamplingParams(
    temperature=0, max_tokens=40, logprobs=20, prompt_logprobs=20, ignore_eos=True, detokenize=False
)


def draw(rng: random.Random) -> Pattern:
    if rng.random() < 0.2:
        return Pattern()
    return Pattern(rng.choice([0, 1, 4]), rng.choice([0, 10, 60, 100]), rng.choice([1, 16, 33, 70]))


def plan_for(model, seed=1):
    return random_plan(model, seed, draw)


@contextmanager
def held(model, plan, prompt, tokens, context=CONTEXT, from_prefix=False):
    """The model in transformers with the patterns of the slab, in segments: the prompt, then `EVICT_EVERY` tokens each.

    from_prefix: the prompt is that of a prefix, of which a head keeps its pattern alone.
    """

    def wide(head):
        if from_prefix:
            return head
        pattern = widen(head.pattern, context)
        return head.model_copy(update={"sink": pattern.sink, "top_k": pattern.top_k, "window": pattern.window})

    layers = tuple(None if heads is None else tuple(wide(head) for head in heads) for heads in plan.layers)
    kept = plan.model_copy(update={"layers": layers, "decode_window": 0})
    whole, rest = divmod(tokens - prompt, EVICT_EVERY)
    segments = [size for size in (prompt, *[EVICT_EVERY] * whole, rest) if size]
    given, calls, mask = reference_module.segment_scores, [], reference_module.segment_mask

    def first_only(query, *rest):  # only the prompt has prompt scores
        calls.append(query.shape[2])
        return given(query, *rest) if prompt and len(calls) % len(segments) == 1 % len(segments) else None

    reference_module.segment_scores = first_only
    if from_prefix:
        reference_module.segment_mask = partial(mask_after_prefix, context)
    try:
        with reference.masked(model, kept, None, segments):
            if not prompt:
                reference._running[-1] = (
                    *reference._running[-1][:3],
                    (None,) * len(plan.layers),
                    *reference._running[-1][4:],
                )
            yield
    finally:
        reference_module.segment_scores, reference_module.segment_mask = given, mask


def mask_after_prefix(context, pattern, positions, scores, own, ends, *_):
    """As `reference.segment_mask`; heads keep the slab's pattern after the first segment."""
    held = torch.zeros_like(positions, dtype=torch.bool)
    seen, ranks = held[..., None].repeat(1, 1, held.shape[1]), scores.clone()
    for begin, end in pairwise(ends):
        keeps = widen(pattern, context) if begin else pattern
        held[:, begin:end] = True
        seen[:, begin:end] = held[:, None] & (positions[:, None] <= positions[:, begin:end, None])
        if keeps.window is None:
            continue
        safe = (positions < keeps.sink) | (positions >= end - keeps.window)
        if not begin and keeps.size(end) < end:
            ranks[:, :end] = torch.where(safe, scores, own)[:, :end]
        between = ranks.masked_fill(~held | safe, float("-inf"))
        best = torch.zeros_like(held).scatter_(1, between.topk(min(keeps.top_k, held.shape[1])).indices, True)
        held &= safe | best
    return seen


def worst(model, plan, output, context=CONTEXT, dense=True, prefix=None):
    """Return the largest difference from the reference, or from one whose importance scores differ by rounding.

    Keys with nearly the same score can change places through rounding in the model, and other keys are kept then. prefix: tokens
    of the prefix from which the request started.
    """
    prompt, tokens = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
    found, first = [], prefix or (prompt if dense else 0)
    for draw in range(9):
        with held(model, plan, first, prompt + tokens, context, prefix is not None), rounded(plan, draw):
            found.append(expected.worst(model, output))
        if found[-1] < BOUND:
            break
    return min(found)


@contextmanager
def rounded(plan, draw):
    """Scorer weights with relative changes of about 1e-5, none in draw 0."""
    given = type(plan).scores

    def scores(plan, layer):
        weights, generator = given(plan, layer), torch.Generator().manual_seed((draw + 1) // 2)
        sign = 0 if not draw else (-1) ** draw
        return weights * (1 + sign * 1e-5 * torch.randn(weights.shape, generator=generator))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(plan), "scores", scores)
        yield


def scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def free_blocks(llm):
    return scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()


@pytest.mark.parametrize(
    ("family", "prefill"),
    [(family, "dense") for family in tiny.SERVED]
    + [(family, "sparse") for family in ("llama", "llama-mha", "gemma3", "gpt-oss")],
)
def test_every_family_equals_the_reference(engine, model_folder, family, prefill):
    """Prompts of different lengths in one batch, in chunks of 256 tokens."""
    model = tiny.tiny(family)
    plan = plan_for(model)
    llm = engine(model_folder(model), plan, prefill, block_size=32)
    before = free_blocks(llm)
    outputs = llm.generate(tiny.prompts([600, 333, 47, 470, 512, 1]), ASK_ALL, use_tqdm=False)
    assert max(worst(model, plan, output, dense=prefill == "dense") for output in outputs) < BOUND
    assert max(expected.worst(model, output) for output in outputs) > 0.01  # the plan changes outputs
    assert free_blocks(llm) == before


@fp8
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
@pytest.mark.parametrize(("name", "dtype"), [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_keys_with_8_bits_equal_the_reference(engine, model_folder, prefill, name, dtype):
    """A rounding error in the model may change the 8-bit float of an element, so single outputs differ more than their mean."""
    model = tiny.tiny("llama")
    plan = plan_for(model)
    llm = engine(model_folder(model), plan, prefill, block_size=32, kv_cache_dtype=name)
    config, before = scheduler(llm).kv_cache_config, free_blocks(llm)
    heads = len(plan.layers) * plan.model.kv_heads
    assert config.kv_cache_tensors[0].size == config.num_blocks * 32 * heads * 2 * plan.model.head_dim  # bytes
    for output in llm.generate(tiny.prompts([600, 333, 47, 470]), ASK_ALL, use_tqdm=False):
        prompt = len(output.prompt_token_ids)
        first = prompt if prefill == "dense" else 0
        with held(model, plan, first, prompt + len(output.outputs[0].token_ids)):
            unrounded = mean(expected.differences(model, output))
            with expected.in_8_bits(dtype):
                assert mean(expected.differences(model, output)) < 1e-3 < 0.1 * unrounded
    assert free_blocks(llm) == before


@pytest.mark.parametrize("block", [64, 128])
def test_blocks_longer_than_the_steps_of_eviction(engine, model_folder, block):
    model = tiny.tiny("llama")
    plan = plan_for(model, block)
    llm = engine(model_folder(model), plan, block_size=block)
    outputs = llm.generate(tiny.prompts([600, 47]), ASK_ALL, use_tqdm=False)
    assert max(worst(model, plan, output) for output in outputs) < BOUND


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
@pytest.mark.parametrize("chunk", [200, 1024])
def test_a_sequence_holds_the_blocks_of_its_length(engine, model_folder, prefill, chunk):
    """While a prompt is read in several chunks, its blocks come on top, and are free again at the next step."""
    model, prompt, new = tiny.tiny("llama"), 700, 90
    plan = plan_for(model)
    llm = engine(model_folder(model), plan, prefill, block_size=32, max_num_batched_tokens=chunk)
    slab, before = Slab.of(plan, CONTEXT, 32), free_blocks(llm)
    assert len(scheduler(llm).kv_cache_config.kv_cache_groups) == 1
    core, taken, shown = llm.llm_engine, [], []
    core.add_request(
        "one", tiny.prompts([prompt])[0], SamplingParams(max_tokens=new, ignore_eos=True, detokenize=False)
    )
    while core.has_unfinished_requests():
        core.step()
        taken.append(before - free_blocks(llm))
        found = {metric.name: metric.value for metric in llm.get_metrics() if metric.name.startswith("vllm:headsink")}
        shown.append((found["vllm:headsink_kv_blocks"], found["vllm:headsink_kv_blocks_full_cache"]))
    tokens = [*(min(n * chunk, prompt) for n in range(1, -(-prompt // chunk))), *range(prompt, prompt + new)]
    assert shown[:-1] == [(used, -(-n // 32)) for used, n in zip(taken[:-1], tokens[:-1], strict=True)]
    assert shown[-1] == (0, 0)
    reading = -(-prompt // chunk)
    if prefill == "dense":
        at_end = blocks_for(slab.needs, prompt)
        assert taken[: reading - 1] == [at_end + -(-n * chunk // 32) for n in range(1, reading)]
    else:
        assert taken[: reading - 1] == [blocks_for(slab.needs, n * chunk) for n in range(1, reading)]
    later = [blocks_for(slab.needs, prompt + n) for n in range(1, new)]
    assert taken[reading : reading + len(later) - 1] == later[: len(taken) - reading - 1]
    most = later[-1]
    planned = sum(head.pattern.size(789) for heads in plan.layers for head in heads)
    lanes = len(plan.layers) * len(plan.layers[0])
    assert planned <= most * 32 * lanes < planned + lanes * (2 * EVICT_EVERY + 2 * 32)
    assert free_blocks(llm) == before


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_outputs_do_not_depend_on_chunks_batches_or_preemption(engine, model_folder, prefill):
    model = tiny.tiny("llama-mha")
    # Most heads keep everything, so sequences grow while they decode, and vLLM preempts some.
    plan = random_plan(model, 3, lambda rng: Pattern() if rng.random() < 0.7 else draw(rng))
    folder = model_folder(model)
    ask = SamplingParams(temperature=0, max_tokens=160, logprobs=5, ignore_eos=True, detokenize=False)
    prompts = tiny.prompts([40, 60, 33, 50, 270, 45, 230])
    options = {"block_size": 32, "max_model_len": 430}
    llm = engine(folder, plan, prefill, num_gpu_blocks_override=30, max_num_batched_tokens=100, **options)
    before, together = free_blocks(llm), llm.generate(prompts, ask, use_tqdm=False)
    metrics = {found.name: found.value for found in llm.get_metrics() if found.name == "vllm:num_preemptions"}
    assert metrics["vllm:num_preemptions"] > 0
    assert free_blocks(llm) == before
    llm = engine(folder, plan, prefill, max_num_batched_tokens=430, **options)
    alone = [llm.generate(prompt, ask, use_tqdm=False)[0] for prompt in prompts]
    for one, other in zip(together, alone, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        for a, b in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            assert max(abs(a[token].logprob - b[token].logprob) for token in a.keys() & b.keys()) < 1e-5
    assert max(worst(model, plan, output, 430, prefill == "dense") for output in together) < BOUND


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_random_requests_and_aborts_leak_no_block(engine, model_folder, prefill):
    model = tiny.tiny("llama")
    plan, rng = plan_for(model, 5), random.Random(0)
    llm = engine(model_folder(model), plan, prefill, block_size=32, num_gpu_blocks_override=60)
    core, before = llm.llm_engine, free_blocks(llm)
    running: set[str] = set()
    for number in range(160):
        length, tokens = rng.randint(1, 900), rng.randint(1, 60)
        ask = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False)
        core.add_request(str(number), tiny.prompts([length], seed=number)[0], ask)
        running.add(str(number))
        for _ in range(rng.randint(0, 4)):
            running -= {output.request_id for output in core.step() if output.finished}
        if running and rng.random() < 0.2:
            gone = rng.choice(sorted(running))
            core.abort_request([gone])
            running.discard(gone)
        if number > 80 and rng.random() < 0.05:
            core.abort_request(sorted(running))
            running.clear()
    while core.has_unfinished_requests():
        core.step()
    assert free_blocks(llm) == before
    manager = scheduler(llm).kv_cache_manager.coordinator.single_type_managers[0]
    assert not manager.prompts
    assert not manager.reading


@pytest.mark.parametrize("family", ["llama", "llama-mha", "gpt-oss"])
def test_two_ranks(engine, model_folder, monkeypatch, family):
    """With one and with two KV heads per rank."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = tiny.tiny(family)
    plan = plan_for(model)
    llm = engine(model_folder(model), plan, block_size=32, tensor_parallel_size=2)
    outputs = llm.generate(tiny.prompts([37, 300, 701]), ASK_ALL, use_tqdm=False)
    assert max(worst(model, plan, output) for output in outputs) < BOUND


def test_compiled(engine, model_folder):
    model = tiny.tiny("llama")
    plan = plan_for(model)
    llm = engine(model_folder(model), plan, block_size=32, enforce_eager=False)
    outputs = llm.generate(tiny.prompts([37, 300, 701]), ASK_ALL, use_tqdm=False)
    assert max(worst(model, plan, output) for output in outputs) < BOUND


@pytest.mark.parametrize("cache", ["auto", pytest.param("fp8", marks=fp8)])
def test_bfloat16_is_close_to_the_reference(engine, model_folder, cache):
    model = tiny.tiny("llama")
    plan = plan_for(model)
    llm = engine(model_folder(model), plan, block_size=32, dtype="bfloat16", kv_cache_dtype=cache)
    rounding = nullcontext if cache == "auto" else partial(expected.in_8_bits, torch.float8_e4m3fn)
    outputs = llm.generate(tiny.prompts([300, 47]), ASK_ALL, use_tqdm=False)
    for output in outputs:  # rounded scores choose other keys now and then, so the largest difference says little
        prompt = len(output.prompt_token_ids)
        with held(model, plan, prompt, prompt + len(output.outputs[0].token_ids)), rounding():
            found = expected.differences(model, output)
        assert sum(found) / len(found) < 0.03


def test_what_is_refused(engine, model_folder):
    model = tiny.tiny("llama")
    with pytest.raises(HeadsinkError, match="prefix caching cannot be used together with a plan"):
        engine(model_folder(model), plan_for(model), enable_prefix_caching=True)
    sliding = tiny.tiny("gemma3")
    sliding.config.layer_types = ["full_attention"] * 3 + ["sliding_attention"]
    changed = type(sliding)(sliding.config)
    with pytest.raises(HeadsinkError, match="into several groups"):
        engine(model_folder(changed), random_plan(changed, 1, draw))


def test_a_slab_gives_every_page_to_one_head():
    model = tiny.tiny("llama-mha")
    for seed in range(5):
        slab = Slab.of(plan_for(model, seed), CONTEXT, 32)
        lanes = slab.column.shape[0] * slab.column.shape[1]
        assert f"{len(slab.needs)} blocks, {len(slab.needs) / 32:.0%} of the full" in str(slab)
        used = [
            (int(slab.column[layer, head, page]), int(slab.lane[layer, head, page]))
            for layer in range(slab.column.shape[0])
            for head in range(slab.column.shape[1])
            for page in range(-(-min(int(slab.keeps[layer, head]) + EVICT_EVERY, CONTEXT) // 32))
        ]
        assert len(set(used)) == len(used)
        assert max(lane for _, lane in used) < lanes
        for prompt in (0, 1, 100, 333, 640):
            sequence, past = torch.tensor([prompt]), torch.zeros(lanes, dtype=torch.long)
            for tokens in range(prompt, CONTEXT + 1):
                given = torch.tensor([tokens]), sequence, torch.zeros(*slab.keeps.shape, 1, dtype=torch.long)
                held_now, evicted = (of.flatten() for of in slab.held(*given))
                assert tokens == prompt or torch.equal(held_now, past + 1)
                past = held_now - evicted
                assert torch.equal(
                    evicted > 0, (held_now > slab.keeps.flatten()) & ((tokens - prompt) % EVICT_EVERY == 0)
                )
                assert not evicted.any() or torch.equal(past, held_now.minimum(slab.keeps.flatten()))
                if evicted.any() and tokens > prompt:
                    assert int(slab.next_eviction(torch.tensor([tokens - 1]), sequence)) == tokens
                pages = -(-held_now // 32)
                column = slab.column.flatten(0, 1).gather(1, (pages - 1).clamp(min=0)[:, None])[:, 0]
                assert int(column[pages > 0].max() if tokens else 0) < blocks_for(slab.needs, max(tokens, 1))

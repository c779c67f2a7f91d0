"""vLLM's cache under a plan: its size, prefix caching, preemption and capacity."""

import expected
import tiny
from vllm import SamplingParams

BOUND = 1e-4
ASK = SamplingParams(temperature=0, max_tokens=8, logprobs=20, ignore_eos=True, detokenize=False)


def scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def blocks_in_use(llm):
    pool = scheduler(llm).kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is the null block


def metric(llm, name):
    return sum(found.value for found in llm.get_metrics() if found.name == name)


def test_a_sequence_uses_the_bytes_of_the_grouping(engine, served):
    """Chunked prefill, then decoding up to the maximum length."""
    model, plan, folder = served
    llm = engine(folder, plan, block_size=32, enable_prefix_caching=False)
    found = expected.grouping(model, plan, 32)
    config = scheduler(llm).kv_cache_config
    assert len(config.kv_cache_groups) == found.groups
    page = config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
    slots = max(len(group.layer_names) for group in config.kv_cache_groups)

    engine_ = llm.llm_engine
    ask = SamplingParams(max_tokens=60, ignore_eos=True, detokenize=False)
    engine_.add_request("one", tiny.prompts([1024 - 60])[0], ask)
    held = []
    while engine_.has_unfinished_requests():
        engine_.step()
        held.append(blocks_in_use(llm) * page * slots)
    assert max(held[6:]) == found.used  # during prefill, all blocks of a chunk are allocated
    assert found.used < 0.8 * found.full
    assert blocks_in_use(llm) == 0


def test_prefix_cache_hits_do_not_change_outputs(engine, served):
    model, plan, folder = served
    llm = engine(folder, plan, block_size=32, enable_prefix_caching=True)
    start = tiny.prompts([601])[0]["prompt_token_ids"]
    prompts = [{"prompt_token_ids": start + end["prompt_token_ids"]} for end in tiny.prompts([20, 90], seed=5)]
    outputs = [llm.generate(prompt, ASK, use_tqdm=False)[0] for prompt in (*prompts, prompts[0])]
    assert [output.num_cached_tokens for output in outputs] == [0, 576, 608]
    with expected.masked(model, plan, 32):
        assert max(expected.worst(model, output) for output in outputs) < BOUND


def test_a_prefix_without_its_sink_blocks_is_recomputed(engine, served):
    model, plan, folder = served
    llm = engine(folder, plan, block_size=32, enable_prefix_caching=True, num_gpu_blocks_override=200)
    prompt = tiny.prompts([601])[0]
    outputs = [llm.generate(prompt, ASK, use_tqdm=False)[0]]
    llm.generate(tiny.prompts([700] * 6, seed=9), ASK, use_tqdm=False)  # evict the prefix from the prefix cache
    outputs.append(llm.generate(prompt, ASK, use_tqdm=False)[0])
    with expected.masked(model, plan, 32):
        assert max(expected.worst(model, output) for output in outputs) < BOUND


def test_preempted_requests_give_the_same_outputs(engine, served):
    model, plan, folder = served
    ask = SamplingParams(temperature=0, max_tokens=90, logprobs=5, ignore_eos=True, detokenize=False)
    prompts = tiny.prompts([40, 90, 150, 220, 33, 300])
    llm = engine(
        folder, plan, block_size=32, num_gpu_blocks_override=110, max_model_len=390, enable_prefix_caching=False
    )
    together = llm.generate(prompts, ask, use_tqdm=False)
    assert metric(llm, "vllm:num_preemptions") > 0
    alone = [llm.generate(prompt, ask, use_tqdm=False)[0] for prompt in prompts]
    for one, other in zip(together, alone, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
    with expected.masked(model, plan, 32, 390):
        assert max(expected.worst(model, output) for output in together[:3]) < BOUND


def test_more_sequences_fit_into_the_same_pool(engine, served):
    """vLLM reports how many sequences of maximum length fit."""
    _, plan, folder = served
    capacity = []
    for given in (plan, None):
        llm = engine(folder, given, block_size=32, kv_cache_memory_bytes=2**24)
        config = llm.llm_engine.vllm_config.cache_config
        capacity.append(config.kv_cache_max_concurrency)
    assert capacity[0] > 1.2 * capacity[1]

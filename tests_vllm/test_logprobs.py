"""vLLM under a plan gives the log-probabilities of the model in transformers, masked to the same blocks."""

import random
from statistics import mean

import expected
import pytest
import tiny
import torch
from conftest import fp8
from plans import random_plan
from transformers import AutoTokenizer
from vllm import SamplingParams

from headsink import Pattern, Plan
from headsink.data import corpus

BOUND = 1e-4
ASK_ALL = SamplingParams(
    temperature=0, max_tokens=8, logprobs=20, prompt_logprobs=20, ignore_eos=True, detokenize=False
)


def quarter(rng: random.Random) -> Pattern:
    """Heads that keep about a quarter of 2,000 tokens on average."""
    return Pattern() if rng.random() < 0.15 else Pattern(4, 0, rng.choice([64, 128, 256, 512]))


@pytest.mark.parametrize("family", [*tiny.DENSE, "qwen3-moe", "gpt-oss"])
def test_every_family_under_a_random_plan(engine, model_folder, family):
    """Three prompts of different lengths in one batch, in chunks of 256 tokens."""
    model = tiny.tiny(family)
    plan = tiny.plan_for(model, seed=1)
    llm = engine(model_folder(model), plan, block_size=32)
    outputs = llm.generate(tiny.prompts([37, 300, 701]), ASK_ALL, use_tqdm=False)
    with expected.masked(model, plan, 32):
        assert max(expected.worst(model, output) for output in outputs) < BOUND
    assert max(expected.worst(model, output) for output in outputs) > 0.01  # the plan changes outputs


@fp8
@pytest.mark.parametrize(("name", "dtype"), [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_keys_with_8_bits(engine, model_folder, name, dtype):
    model = tiny.tiny("llama-mha")
    plan = tiny.plan_for(model, seed=1)
    llm = engine(model_folder(model), plan, block_size=32, kv_cache_dtype=name)
    outputs = llm.generate(tiny.prompts([37, 300, 701]), ASK_ALL, use_tqdm=False)
    for output in outputs:
        with expected.masked(model, plan, 32):
            unrounded = mean(expected.differences(model, output))
            with expected.truncated(dtype):
                assert mean(expected.differences(model, output)) < 1e-3 < 0.1 * unrounded


@pytest.mark.parametrize("block", [64, 96, 128])
def test_every_size_of_block(engine, model_folder, block):
    model = tiny.tiny("llama")
    plan = tiny.plan_for(model, seed=block)
    llm = engine(model_folder(model), plan, block_size=block)
    outputs = llm.generate(tiny.prompts([37, 300, 701]), ASK_ALL, use_tqdm=False)
    with expected.masked(model, plan, block):
        assert max(expected.worst(model, output) for output in outputs) < BOUND


def test_the_built_in_model_in_text_order(engine, smollm2):
    model, folder = smollm2
    plan = random_plan(model, 3, quarter)
    ids = corpus.tokens("prose", AutoTokenizer.from_pretrained(folder), 3000, split="heldout")
    prompts = [
        {"prompt_token_ids": ids[start : start + length]} for start, length in ((0, 150), (500, 700), (900, 1300))
    ]
    llm = engine(folder, plan, block_size=32, max_model_len=2048, max_num_batched_tokens=1024)
    outputs = llm.generate(prompts, ASK_ALL, use_tqdm=False)
    with expected.masked(model, plan, 32, 2048):
        assert max(expected.worst(model, output) for output in outputs) < BOUND
    assert expected.grouping(model, plan, 32, 2048).used < 0.4 * expected.grouping(model, plan, 32, 2048).full


def test_a_full_plan_equals_stock_vllm(engine, model_folder):
    model = tiny.tiny("llama")
    folder, prompts = model_folder(model), tiny.prompts([37, 300])
    planned = engine(folder, Plan.full(model)).generate(prompts, ASK_ALL, use_tqdm=False)
    stock = engine(folder).generate(prompts, ASK_ALL, use_tqdm=False)
    for one, other in zip(planned, stock, strict=True):
        assert one.prompt_logprobs == other.prompt_logprobs
        assert one.outputs[0].logprobs == other.outputs[0].logprobs


def test_compiled(engine, model_folder):
    """The graph that vLLM compiles has one call per head."""
    model = tiny.tiny("llama")
    plan = tiny.plan_for(model, seed=1)
    folder, prompts = model_folder(model), tiny.prompts([37, 300, 701])
    options = {"block_size": 32, "enforce_eager": False}
    outputs = engine(folder, plan, **options).generate(prompts, ASK_ALL, use_tqdm=False)
    with expected.masked(model, plan, 32):
        assert max(expected.worst(model, output) for output in outputs) < BOUND

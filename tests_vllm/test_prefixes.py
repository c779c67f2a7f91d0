"""Requests that start from a prefix, which `headsink.prefill` wrote in another process."""

import subprocess
import sys
from statistics import mean

import expected
import pytest
import test_slab
import tiny
import torch
from conftest import fp8
from plans import random_plan
from safetensors.torch import load_file
from vllm import SamplingParams

from headsink import HeadsinkError, Pattern

# In processes of their own: vLLM does not start where numba has compiled kernels.
WRITE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
import headsink
from headsink.runtime.prefill import prefill

folder, plan, ids, path, reconstruct = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = torch.tensor([json.loads(ids)])
cache = prefill(model, headsink.Plan.load(plan), ids, reconstruct=reconstruct == "yes")
headsink.save_prefix(path, cache, ids)
"""
CONTINUE = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
import headsink

folder, path, rest, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
cache, _ = headsink.load_prefix(path, model)
cache.freeze()
with torch.no_grad(), headsink.apply(model, cache.plan):
    logits = model(torch.tensor([json.loads(rest)]), past_key_values=cache).logits[0]
save_file({"found": logits.log_softmax(-1)}, out)
"""
ASK = SamplingParams(temperature=0, max_tokens=70, logprobs=20, ignore_eos=True, detokenize=False)


@pytest.fixture
def prefix(tmp_path):
    """Write prefixes: `prefix(folder, plan, ids)` returns the path. In a process of its own, as vLLM needs."""

    def write(folder, plan, ids, reconstruct=False):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        plan_file = plan.save(tmp_path / "plan.json", force=True)
        run(WRITE, folder, plan_file, ids, path, "yes" if reconstruct else "no")
        return path

    return write


def run(script, *arguments):
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True)


def after(ids, lengths):
    return [{"prompt_token_ids": ids + one["prompt_token_ids"]} for one in tiny.prompts(lengths, seed=9)]


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_requests_after_a_prefix_equal_the_reference(engine, model_folder, prefix, prefill):
    """In one batch with requests that do not begin with it, and with one that is equal to it."""
    model = tiny.tiny("llama")
    plan, folder = test_slab.plan_for(model), model_folder(model)
    (long, short), other = (one["prompt_token_ids"] for one in tiny.prompts([400, 40], seed=5)), tiny.prompts([300])
    files = [prefix(folder, plan, ids) for ids in (short, long)]
    llm = engine(folder, plan, prefill, files, block_size=32)
    before = test_slab.free_blocks(llm)
    prompts = after(long, [1, 45, 130]) + after(short, [60]) + other + [{"prompt_token_ids": long}]
    outputs = llm.generate(prompts, ASK, use_tqdm=False)
    assert [output.num_cached_tokens for output in outputs] == [400, 400, 400, 40, 0, 0]
    for output in outputs:
        found = test_slab.worst(model, plan, output, dense=prefill == "dense", prefix=output.num_cached_tokens or None)
        assert found < test_slab.BOUND
    assert test_slab.free_blocks(llm) == before


def test_a_reconstructed_prefix_equals_its_cache_in_transformers(engine, model_folder, prefix, tmp_path):
    """Up to the first eviction after it."""
    model = tiny.tiny("llama-mha")
    plan, folder = test_slab.plan_for(model), model_folder(model)
    ids = tiny.prompts([500])[0]["prompt_token_ids"]
    file = prefix(folder, plan, ids, reconstruct=True)
    llm = engine(folder, plan, prefixes=[file], block_size=32)
    ask = SamplingParams(temperature=0, max_tokens=20, logprobs=20, ignore_eos=True, detokenize=False)
    (output,) = llm.generate(after(ids, [10]), ask, use_tqdm=False)
    assert output.num_cached_tokens == 500
    answer, out = output.outputs[0], tmp_path / "expected"
    run(CONTINUE, folder, file, output.prompt_token_ids[500:] + list(answer.token_ids), out)
    expected = load_file(out)["found"]
    for n, row in enumerate(answer.logprobs):
        assert all(abs(expected[9 + n, token] - found.logprob) < 1e-4 for token, found in row.items())


@fp8
def test_a_prefix_is_rounded_to_the_cache_of_the_server(engine, model_folder, prefix):
    model = tiny.tiny("llama")
    plan, folder = test_slab.plan_for(model), model_folder(model)
    ids = tiny.prompts([400], seed=5)[0]["prompt_token_ids"]
    llm = engine(folder, plan, prefixes=[prefix(folder, plan, ids)], block_size=32, kv_cache_dtype="fp8")
    for output in llm.generate(after(ids, [1, 45, 130]), ASK, use_tqdm=False):
        assert output.num_cached_tokens == 400
        tokens = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
        with test_slab.held(model, plan, 400, tokens, from_prefix=True):
            unrounded = mean(expected.differences(model, output))
            with expected.in_8_bits(torch.float8_e4m3fn, 400):
                assert mean(expected.differences(model, output)) < 1e-3 < 0.1 * unrounded


def test_preempted_requests_load_the_prefix_again(engine, model_folder, prefix):
    model = tiny.tiny("llama-mha")
    # Most heads keep everything, so that sequences grow while they decode.
    plan = random_plan(model, 3, lambda rng: Pattern() if rng.random() < 0.7 else test_slab.draw(rng))
    folder = model_folder(model)
    ids = tiny.prompts([300])[0]["prompt_token_ids"]
    file, prompts = prefix(folder, plan, ids), after(ids, [1, 20, 35, 50, 64, 5])
    ask = SamplingParams(temperature=0, max_tokens=200, logprobs=5, ignore_eos=True, detokenize=False)
    llm = engine(folder, plan, prefixes=[file], block_size=32, num_gpu_blocks_override=40, max_model_len=600)
    before, together = test_slab.free_blocks(llm), llm.generate(prompts, ask, use_tqdm=False)
    metrics = {found.name: found.value for found in llm.get_metrics() if found.name == "vllm:num_preemptions"}
    assert metrics["vllm:num_preemptions"] > 0
    assert test_slab.free_blocks(llm) == before
    for prompt, one in zip(prompts, together, strict=True):
        (alone,) = llm.generate(prompt, ask, use_tqdm=False)
        assert alone.outputs[0].token_ids == one.outputs[0].token_ids


def test_two_ranks_start_from_a_prefix(engine, model_folder, prefix, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = tiny.tiny("llama-mha")
    plan, folder = test_slab.plan_for(model), model_folder(model)
    ids = tiny.prompts([400])[0]["prompt_token_ids"]
    file = prefix(folder, plan, ids)
    llm = engine(folder, plan, prefixes=[file], block_size=32, tensor_parallel_size=2)
    outputs = llm.generate(after(ids, [45]), ASK, use_tqdm=False)
    assert outputs[0].num_cached_tokens == 400
    assert test_slab.worst(model, plan, outputs[0], prefix=400) < test_slab.BOUND


def test_what_is_refused(engine, model_folder, prefix):
    model = tiny.tiny("llama")
    plan, folder = test_slab.plan_for(model), model_folder(model)
    file = prefix(folder, plan, tiny.prompts([100])[0]["prompt_token_ids"])
    with pytest.raises(HeadsinkError, match="made under another plan"):
        engine(folder, test_slab.plan_for(model, 2), prefixes=[file])
    with pytest.raises(HeadsinkError, match="its keys and values are float32, the server's are bfloat16"):
        engine(folder, plan, prefixes=[file], dtype="bfloat16")
    with pytest.raises(HeadsinkError, match="only under a plan with top-k keys"):
        engine(folder, tiny.plan_for(model), prefixes=[file])

"""Tensor parallelism: two processes, each with half of the heads."""

import expected
import pytest
import tiny
from vllm import SamplingParams

ASK = SamplingParams(temperature=0, max_tokens=8, logprobs=20, prompt_logprobs=20, ignore_eos=True, detokenize=False)


@pytest.mark.parametrize("family", ["llama", "llama-mha"])
def test_two_ranks_equal_one_model(engine, model_folder, monkeypatch, family):
    """With one and with two KV heads per rank."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = tiny.tiny(family)
    plan = tiny.plan_for(model, seed=1)
    llm = engine(model_folder(model), plan, block_size=32, tensor_parallel_size=2)
    outputs = llm.generate(tiny.prompts([37, 300, 701]), ASK, use_tqdm=False)
    with expected.masked(model, plan, 32, ranks=2):
        assert max(expected.worst(model, output) for output in outputs) < 1e-4

"""vLLM under a plan gives the log-probabilities of the model in transformers, masked to the same blocks."""

import expected
import pytest
import tiny
from vllm import SamplingParams

BOUND = 1e-4
ASK = SamplingParams(temperature=0, max_tokens=8, logprobs=20, ignore_eos=True, detokenize=False)
ASK_ALL = SamplingParams(
    temperature=0, max_tokens=8, logprobs=20, prompt_logprobs=20, ignore_eos=True, detokenize=False
)


@pytest.mark.parametrize("family", tiny.SERVED)
def test_every_family_under_a_random_plan(engine, model_folder, family):
    """Three prompts of different lengths in one batch, read in chunks of 256 tokens."""
    model = tiny.tiny(family)
    plan = tiny.plan_for(model, seed=1)
    llm = engine(model_folder(model), plan, block_size=32)
    outputs = llm.generate(tiny.prompts([37, 300, 701]), ASK_ALL, use_tqdm=False)
    with expected.masked(model, plan, 32):
        differences = [expected.worst(model, output) for output in outputs]
    assert max(differences) < BOUND
    assert max(expected.worst(model, output) for output in outputs) > 0.01  # the plan does something

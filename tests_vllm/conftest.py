"""vLLM engines in the test process, on tiny random models in float32 and on the built-in model."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning threads hang on a busy machine
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that tests can read the scheduler
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import pytest
import torch

fp8 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's kernels read 8-bit floats with AVX-512 only"
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def engine():
    """Start engines, one at a time: `engine(folder, plan, **options)` returns a `vllm.LLM`."""
    import gc

    from vllm import LLM

    import headsink.serving.vllm.settings

    started = []

    def start(folder, plan=None, prefill="dense", prefixes=(), **options):
        close()
        given = {} if plan is None else headsink.serving.vllm.settings.engine_args(plan, prefill, prefixes)
        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "max_model_len": 1024,
            "max_num_batched_tokens": 256,
            "max_logprobs": 500,
            "disable_log_stats": False,
        }
        started.append(LLM(str(folder), **defaults | given | options))
        return started[-1]

    def close():
        while started:
            started.pop().llm_engine.engine_core.shutdown()
        gc.collect()

    yield start
    close()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Save models: `model_folder(model)` returns the folder."""

    def save(model, tokenizer=None):
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def smollm2():
    """The built-in model in float32, and its folder."""
    import headsink
    from headsink.models.loading import find

    return headsink.load("smollm2", dtype="float32", device="cpu")[0], Path(find("smollm2")[0])


@pytest.fixture(scope="session")
def served(model_folder):
    """A tiny model, a plan for it, its folder."""
    import tiny

    model = tiny.tiny("llama-mha")
    return model, tiny.plan_for(model, seed=1), model_folder(model)

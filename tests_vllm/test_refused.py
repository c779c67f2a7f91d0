"""Unsupported settings of vLLM are refused at startup."""

import pytest
import tiny
import torch

from headsink import HeadsinkError
from headsink.serving.vllm.launch import command


def test_a_plan_of_another_model_is_refused(engine, served, model_folder):
    _, plan, _ = served
    with pytest.raises(HeadsinkError, match="for other weights"):
        engine(model_folder(tiny.tiny("llama-mha", seed=1)), plan)
    with pytest.raises(HeadsinkError, match="another model: kv_heads is 2 here and 4 in the plan"):
        engine(model_folder(tiny.tiny("llama")), plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "a quantised KV cache of another kind than fp8"),
        ({"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]}, "a quantised KV cache in some layers alone"),
        ({"enable_lora": True}, "a LoRA adapter"),
    ],
)
def test_incompatible_settings_are_refused_at_startup(engine, served, options, message):
    _, plan, folder = served
    with pytest.raises(HeadsinkError, match=f"{message} cannot be used together with a plan"):
        engine(folder, plan, **options)


def test_an_8_bit_cache_without_the_instructions_is_refused(engine, served, monkeypatch, tmp_path):
    _, plan, folder = served
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    with pytest.raises(HeadsinkError, match="fp8 needs a processor with AVX-512"):
        engine(folder, plan, kv_cache_dtype="fp8")
    file = plan.save(tmp_path / "plan.json")
    for options in (["--kv-cache-dtype", "fp8"], ["--port=1", "--kv_cache_dtype=fp8_e5m2"]):
        with pytest.raises(HeadsinkError, match="fp8 needs a processor with AVX-512"):
            command(str(folder), file, options)

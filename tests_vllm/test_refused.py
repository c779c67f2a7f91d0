"""Unsupported settings of vLLM are refused at startup."""

import pytest
import tiny

from headsink import HeadsinkError


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
        ({"kv_cache_dtype": "fp8"}, "a quantised KV cache"),
        ({"enable_lora": True}, "a LoRA adapter"),
    ],
)
def test_incompatible_settings_are_refused_at_startup(engine, served, options, message):
    _, plan, folder = served
    with pytest.raises(HeadsinkError, match=f"{message} cannot be used together with a plan"):
        engine(folder, plan, **options)

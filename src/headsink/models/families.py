"""Model families that need more than transformers' `AttentionInterface` and `Cache.update`: one record each, data only.

A family without a record runs under a plan as well, and has a compiled CPU step if it is made of the usual parts
(decoding/parts.py). vLLM does not serve it. Light: nothing here imports torch, so that vLLM's plugin can read it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What is known of a family beyond its configuration and its modules.

    model_type: as in the configuration of its text model. late_norms: norms of queries and keys come after their rotation.
    vllm: the class that vLLM serves.
    """

    model_type: str
    late_norms: bool = False
    vllm: str | None = None


_RECORDS = (
    Family("llama", vllm="LlamaForCausalLM"),
    Family("mistral", vllm="MistralForCausalLM"),
    Family("qwen2", vllm="Qwen2ForCausalLM"),
    Family("qwen3", vllm="Qwen3ForCausalLM"),
    Family("gemma3_text", vllm="Gemma3ForCausalLM"),
    Family("gpt_oss", vllm="GptOssForCausalLM"),
    Family("mixtral", vllm="MixtralForCausalLM"),
    Family("olmoe", vllm="OlmoeForCausalLM"),
    Family("qwen3_moe", vllm="Qwen3MoeForCausalLM"),
    Family("hunyuan_v1_dense", late_norms=True),
    Family("hunyuan_v1_moe", late_norms=True),
)
FAMILIES = {family.model_type: family for family in _RECORDS}
LATE_NORMS = {name for name, family in FAMILIES.items() if family.late_norms}
VLLM_CLASSES = tuple(sorted(family.vllm for family in _RECORDS if family.vllm))
# Names of the output projection in an attention module, most common first.
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "Wo")
OWN_CACHE = {"minimax"}  # refuse every cache but a class of their own
ENCODERS = {"bert", "roberta", "xlm-roberta", "electra", "camembert", "deberta", "albert", "rembert", "modernbert"}

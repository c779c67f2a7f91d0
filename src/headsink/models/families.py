"""Model families that need more than transformers' `AttentionInterface` and `Cache.update`: one record each, data only.

A family without a record runs under a plan as well. It has no compiled CPU step and is not served by vLLM. Light: nothing here
imports torch, so that vLLM's plugin can read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """What is known of a family beyond its configuration.

    model_type: as in the configuration of its text model. decode_layout: how the weights of a layer lie, for the compiled CPU
    step; "llama" is q, k, v, o, gate, up and down projections with RMS norms, with or without biases and norms of queries and
    keys. vllm: the class that vLLM serves.
    """

    model_type: str
    decode_layout: Literal["llama"] | None = None
    vllm: str | None = None


_RECORDS = (
    Family("llama", decode_layout="llama", vllm="LlamaForCausalLM"),
    Family("mistral", decode_layout="llama", vllm="MistralForCausalLM"),
    Family("qwen2", decode_layout="llama", vllm="Qwen2ForCausalLM"),
    Family("qwen3", decode_layout="llama", vllm="Qwen3ForCausalLM"),
    Family("gemma3_text", vllm="Gemma3ForCausalLM"),
)
FAMILIES = {family.model_type: family for family in _RECORDS}
COMPILED_DECODE = tuple(name for name, family in FAMILIES.items() if family.decode_layout)
VLLM_CLASSES = tuple(sorted(family.vllm for family in _RECORDS if family.vllm))
# Names of the output projection in an attention module, most common first.
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "Wo")
OWN_CACHE = {"minimax"}  # refuse every cache but a class of their own
ENCODERS = {"bert", "roberta", "xlm-roberta", "electra", "camembert", "deberta", "albert", "rembert", "modernbert"}

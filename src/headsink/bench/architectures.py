"""The families of `headsink bench families`: their configuration class in transformers, and options beside the usual sizes.

Nothing here imports torch. `attention` is the implementation of attention, `sdpa` if it is not given.
"""

from __future__ import annotations

from typing import Any

SIZED = {"head_dim": 64}
SLIDING = SIZED | {
    "sliding_window": 512,
    "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
}
FEW = {"num_experts_per_tok": 4}
EXPERTS = FEW | {"num_experts": 16, "moe_intermediate_size": 704}
LOCAL = FEW | {"num_local_experts": 16, "intermediate_size": 704}
ROUTED = FEW | {
    "n_routed_experts": 16,
    "moe_intermediate_size": 704,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Arcee": ("ArceeConfig", SIZED),
    "Cohere": ("CohereConfig", {}),
    "Cohere 2": ("Cohere2Config", SLIDING),
    "dots.1": ("Dots1Config", SIZED | ROUTED),
    "ERNIE 4.5": ("Ernie4_5Config", SIZED),
    "EXAONE 4": ("Exaone4Config", SLIDING | {"sliding_window_pattern": 3}),
    "Gemma": ("GemmaConfig", SIZED),
    "Gemma 2": ("Gemma2Config", SLIDING | {"attention": "eager"}),
    "Gemma 3": ("Gemma3TextConfig", SLIDING),
    "GLM-4": ("Glm4Config", SIZED),
    "GLM-4 MoE": ("Glm4MoeConfig", SIZED | ROUTED),
    "GPT-NeoX": ("GPTNeoXConfig", {"num_key_value_heads": 16}),
    "gpt-oss": ("GptOssConfig", SLIDING | LOCAL | {"attention": "eager"}),
    "Granite": ("GraniteConfig", {}),
    "Granite MoE": ("GraniteMoeConfig", LOCAL),
    "Helium": ("HeliumConfig", SIZED),
    "Hunyuan": ("HunYuanDenseV1Config", SIZED),
    "Llama": ("LlamaConfig", SIZED),
    "MiniMax-M2": ("MiniMaxM2Config", SIZED | LOCAL),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Mixtral": ("MixtralConfig", LOCAL | {"sliding_window": None}),
    "Nemotron": ("NemotronConfig", SIZED),
    "OLMo 2": ("Olmo2Config", {}),
    "OLMo 3": ("Olmo3Config", {"sliding_window": 512, "layer_types": SLIDING["layer_types"]}),
    "OLMoE": ("OlmoeConfig", FEW | {"num_experts": 16, "intermediate_size": 704}),
    "Phi": ("PhiConfig", {}),
    "Phi-3": ("Phi3Config", {}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", SIZED),
    "Qwen3 MoE": ("Qwen3MoeConfig", SIZED | EXPERTS),
    "Seed-OSS": ("SeedOssConfig", SIZED),
    "SmolLM3": ("SmolLM3Config", {}),
    "StableLM": ("StableLmConfig", {}),
    "Starcoder2": ("Starcoder2Config", {"sliding_window": None}),
}

"""Tiny random models of the families that headsink is tested on."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

SHAPE = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = ["sliding_attention", "full_attention", "full_attention"]
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama-mha": lambda: LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "mistral-sliding": lambda: MistralConfig(**SHAPE, sliding_window=11),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE,
        head_dim=16,
        sliding_window=11,
        layer_types=SLIDING,
    ),
    "phi3": lambda: Phi3Config(**SHAPE),
    "olmo2": lambda: Olmo2Config(**SHAPE),
    "granite": lambda: GraniteConfig(**SHAPE, attention_multiplier=0.2, logits_scaling=0.5),
    "gemma2": lambda: Gemma2Config(
        **SHAPE,
        head_dim=16,
        sliding_window=11,
        layer_types=SLIDING,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=0.5,
    ),
    "gpt-oss": lambda: GptOssConfig(
        **SHAPE,
        head_dim=16,
        sliding_window=11,
        layer_types=SLIDING,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
        experts_implementation="eager",  # other implementations do not support float64
    ),
}
FAMILIES = tuple(CONFIGS)
WINDOWS = ("mistral-sliding", "gemma3")  # whose sliding-window layers kernels of headsink compute
EAGER = (
    "gemma2",
    "gpt-oss",
)  # `sdpa` cannot express their attention: with an all-full plan they are the model up to rounding


def tiny(
    family: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    layers: int = SHAPE["num_hidden_layers"],
    head_dim: int | None = None,
) -> PreTrainedModel:
    """A random model whose attention is far from uniform, so that a wrong mask changes its outputs.

    head_dim: instead of the family's own.
    """
    torch.manual_seed(seed)
    config, attention = CONFIGS[family](), "eager" if family in EAGER else attention
    config.num_hidden_layers = layers
    if head_dim is not None:
        config.head_dim = head_dim
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name:
            torch.nn.init.normal_(parameter, std=0.25)
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, mean=1.0)
    model.generation_config.eos_token_id = None  # random models stop at random
    return model.to(dtype)

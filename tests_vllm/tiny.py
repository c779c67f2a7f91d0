"""Tiny random models of the served families, with heads of a size that vLLM's CPU kernels have, and random plans and prompts."""

import random

import families
import torch
from plans import random_plan
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from headsink import Pattern

SIZE = {"head_dim": 32, "max_position_embeddings": 1024, "num_hidden_layers": 4}
DENSE = ("llama", "llama-mha", "mistral", "qwen2", "qwen3", "gemma3")
# vLLM has sliding windows in every other layer of gpt-oss.
LAYERS = {
    "gemma3": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    "gpt-oss": ["sliding_attention", "full_attention"] * 2,
}
EXPERTS = {
    "mixtral": lambda: MixtralConfig(**families.SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "olmoe": lambda: OlmoeConfig(**families.SHAPE, num_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **families.SHAPE, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1
    ),
}
SERVED = (*DENSE, *EXPERTS, "gpt-oss")


def tiny(family, seed=0, **sizes):
    """A tiny model as in tests/support/families.py, with other sizes."""
    config = (families.CONFIGS | EXPERTS)[family]()
    if family in (
        "qwen2",
        "gpt-oss",
        *EXPERTS,
    ):  # the head dimension is hidden size / heads; experts need multiples of 32
        config.hidden_size = 32 * config.num_attention_heads
    for name, size in (SIZE | sizes).items():
        setattr(config, name, size)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = LAYERS.get(family, ["full_attention"] * config.num_hidden_layers)
    if family == "gpt-oss":  # vLLM rotates as many positions as this makes
        config.rope_parameters["original_max_position_embeddings"] = 32
    config = type(config)(**config.to_dict())
    torch.manual_seed(seed)
    attention = "eager" if family == "gpt-oss" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter, std=2)
        elif parameter.dim() >= 2 and "embed" not in name and "lm_head" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    return model


def servable(rng):
    """A pattern without top-k keys, with sizes around multiples of a block."""
    if rng.random() < 0.3:
        return Pattern()
    return Pattern(rng.choice([0, 1, 4, 32, 70]), 0, rng.choice([0, 1, 2, 32, 33, 64, 65, 100, 129, 300]))


def plan_for(model, seed=0):
    return random_plan(model, seed, servable)


def prompts(lengths, vocabulary=211, seed=0):
    rng = random.Random(seed)
    return [{"prompt_token_ids": [rng.randrange(3, vocabulary) for _ in range(length)]} for length in lengths]

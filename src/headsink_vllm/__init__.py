"""The vLLM plugin of headsink: registers the names of the model classes that run a plan.

vLLM calls `register` (entry point group `vllm.general_plugins`) in the server, the engine and every worker, whatever model is
served. This package is separate from `headsink` and does not import it, because that takes seconds: it only registers the module
of each model class. vLLM imports that module when it serves a model whose configuration names such a class, as set by
`headsink serve` and `headsink.serving.vllm.settings.engine_args`.
"""

FAMILIES = ("Gemma3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
PREFIX = "Headsink"  # of the registered class names, so that vLLM's own classes stay registered


def register() -> None:
    """Register the model classes that run under a plan with vLLM."""
    from vllm import ModelRegistry

    for family in FAMILIES:
        ModelRegistry.register_model(PREFIX + family, f"headsink.serving.vllm.models:{family}")

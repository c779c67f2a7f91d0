"""The vLLM plugin of headsink: registers the names of the model classes that run a plan.

vLLM calls `register` (entry point group `vllm.general_plugins`) in the server, the engine and every worker, whatever model is
served. It imports nothing that takes time: it only registers the module of each model class. vLLM imports that module when it
serves a model whose configuration names such a class, as set by `headsink serve` and
`headsink.serving.vllm.settings.engine_args`.
"""

from headsink.models.families import VLLM_CLASSES

PREFIX = "Headsink"  # of the registered class names, so that vLLM's own classes stay registered


def register() -> None:
    """Register the model classes that run under a plan with vLLM."""
    from vllm import ModelRegistry

    for family in VLLM_CLASSES:
        ModelRegistry.register_model(PREFIX + family, f"headsink.serving.vllm.models:{family}")

"""What vLLM loads of headsink in each of its processes: a list of names, and nothing else.

vLLM calls `register` (entry point group `vllm.general_plugins`) in the server, the engine and every worker, whatever model is
served. It imports nothing that takes time: it only says in which module the model classes are that run under a plan. They
are imported when a model is served whose configuration names one of them, which is what `headsink serve` and
`headsink.serving.vllm.settings.engine_args` see to.
"""

from headsink.models.families import VLLM_CLASSES

PREFIX = "Headsink"  # of the names that vLLM knows our classes by, so that its own stay what they are


def register() -> None:
    """Tell vLLM the names of the model classes that run under a plan."""
    from vllm import ModelRegistry

    for family in VLLM_CLASSES:
        ModelRegistry.register_model(PREFIX + family, f"headsink.serving.vllm.models:{family}")

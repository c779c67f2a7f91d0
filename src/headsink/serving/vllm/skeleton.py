"""What a plan needs to know of a model that vLLM loads, without loading it in transformers: its shape, its rotary embedding, and
the fingerprint of its checkpoint, from weights in checkpoint naming."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from headsink.errors import HeadsinkError
from headsink.models.fingerprint import WeightSample, hash_of, hashed_names
from headsink.models.rope import Rotary
from headsink.models.spec import decoder, describe
from headsink.plan.plan import Plan


def skeleton(config: Any) -> PreTrainedModel:
    """Return a transformers model of this configuration on the meta device: shapes and names without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def rotary(model: PreTrainedModel) -> Rotary | None:
    """Return how a model rotates queries, None if it depends on the length of the text. model: on any device."""
    embedding = getattr(decoder(model), "rotary_emb", None)
    if embedding is None or not describe(model).prefix_free:
        return None
    return Rotary(type(embedding)(model.config).inv_freq.float())


class PassingWeights:
    """Hash weights (as `models.fingerprint` does) while another loader iterates over them.

    quantised: leave out the weights that quantisation changes.
    """

    def __init__(self, model: PreTrainedModel, quantised: bool = False) -> None:
        self._wanted = set(hashed_names(model, linears=not quantised))
        self._samples: dict[str, WeightSample] = {}

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights unchanged and sample those that belong to the hash."""
        for name, weight in weights:
            if name in self._wanted:
                self._samples[name] = WeightSample.of(name, weight)
            yield name, weight

    def hash(self) -> str:
        """Return the hash. Raises HeadsinkError if the checkpoint lacked a weight that belongs to it."""
        missing = sorted(self._wanted - set(self._samples))
        if missing:
            raise HeadsinkError(f"the checkpoint has no {missing[0]}, so it cannot be compared with the plan's model")
        return hash_of([self._samples[name] for name in sorted(self._samples)])


def check_folder(plan: Plan, folder: Path) -> None:
    """Raise HeadsinkError if a plan is not for the model in a folder, by its config and a sample of its safetensors weights."""
    model = skeleton(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    plan.check_shape(describe(model))
    quantised = getattr(model.config, "quantization_config", None) is not None
    passing = PassingWeights(model, quantised)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for _ in passing.watch((name, opened.get_tensor(name)) for name in opened.keys()):  # noqa: SIM118
                pass
    plan.check_weights(passing.hash(), "unquantised" if quantised else "weights")

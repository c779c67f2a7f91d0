"""What a plan needs to know of a model that vLLM loads, without loading it in transformers: its shape, its rotary embedding, and
the fingerprint of its checkpoint, from weights in checkpoint naming."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from headsink.errors import HeadsinkError
from headsink.models.fingerprint import WeightSample, hash_of, hashed_names, sample_indices
from headsink.models.rope import Rotary, frequencies_of
from headsink.models.spec import Architecture, decoder, describe
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
    inverse = frequencies_of(type(embedding)(model.config))
    return None if inverse is None else Rotary(inverse)


class PassingWeights:
    """Hash weights (as `models.fingerprint` does) while another loader iterates over them.

    A checkpoint has one matrix for each expert where transformers has one tensor for all of them. quantised: leave out the
    weights that quantisation changes.
    """

    def __init__(self, model: PreTrainedModel, quantised: bool = False) -> None:
        names = hashed_names(model, linears=not quantised)
        self._wanted = {name: model.get_parameter(name).shape for name in names}
        self._samples: dict[str, WeightSample] = {}
        self._fused: dict[str, FusedSample] = {}

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights unchanged and sample those that belong to the hash."""
        for name, weight in weights:
            self._sample(name.replace(".block_sparse_moe.", ".mlp."), weight)  # Mixtral
            yield name, weight

    def _sample(self, name: str, weight: Tensor) -> None:
        if name in self._wanted:
            self._samples[name] = WeightSample.of(name, weight)
        elif found := EXPERT.fullmatch(name):
            experts, number, matrix = found.groups()
            fused, late = FUSED[matrix]
            whole = f"{experts}.{fused}"
            if whole in self._wanted:
                shape = self._wanted[whole]
                start = int(number) * shape[1:].numel() + late * weight.numel()
                self._fused.setdefault(whole, FusedSample(whole, shape)).add(weight, start)

    def hash(self) -> str:
        """Return the hash. Raises HeadsinkError if the checkpoint lacked a weight that belongs to it."""
        samples = self._samples | {name: of.whole() for name, of in self._fused.items() if of.complete}
        if missing := sorted(set(self._wanted) - set(samples)):
            raise HeadsinkError(f"the checkpoint has no {missing[0]}, so it cannot be compared with the plan's model")
        return hash_of([samples[name] for name in sorted(samples)])


# In a checkpoint: the experts of a layer, the number of one, and one of its matrices.
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight")
# In transformers: the tensor of all experts, and whether the matrix comes second in an expert's part of it.
FUSED = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
}


class FusedSample:
    """The `WeightSample` of a tensor whose parts come one by one."""

    def __init__(self, name: str, shape: torch.Size) -> None:
        self.name, self.shape = name, shape
        self.at = sample_indices(shape.numel())
        self.found: dict[int, Tensor] = {}

    def add(self, part: Tensor, start: int) -> None:
        """part: values of the flat tensor from `start` on."""
        inside = (self.at >= start) & (self.at < start + part.numel())
        values = part.flatten()[(self.at[inside] - start).to(part.device)].cpu()
        self.found |= dict(zip(inside.nonzero()[:, 0].tolist(), values, strict=True))

    @property
    def complete(self) -> bool:
        return len(self.found) == len(self.at)

    def whole(self) -> WeightSample:
        return WeightSample(self.name, tuple(self.shape), torch.stack([self.found[n] for n in range(len(self.at))]))


def check_folder(plan: Plan, folder: Path) -> Architecture:
    """Return the shape of the model in a folder.

    Raises HeadsinkError if a plan is not for it, by its config and a sample of its safetensors weights.
    """
    model = skeleton(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    shape = describe(model)
    plan.check_shape(shape)
    quantised = getattr(model.config, "quantization_config", None) is not None
    passing = PassingWeights(model, quantised)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for _ in passing.watch((name, opened.get_tensor(name)) for name in opened.keys()):  # noqa: SIM118
                pass
    plan.check_weights(passing.hash(), "unquantised" if quantised else "weights")
    return shape

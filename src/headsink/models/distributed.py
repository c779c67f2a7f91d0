"""Access to weights that accelerate offloads, and to heads that tensor parallelism splits over processes.

accelerate loads an offloaded weight only when its module runs; `weights_here` loads it earlier. In tensor parallelism every
process runs the same text and has its share of the heads, in order of rank. `gather_heads` joins results per head,
`sum_over_ranks` adds sums over heads. Nothing is communicated if the model is not split. All processes belong to one
tensor-parallel group, as `headsink.load(tensor_parallel=True)` sets it up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from headsink.errors import HeadsinkError
from headsink.models.spec import Architecture, heads_of, output_projection


def check_all_heads(what: str, shape: Architecture, layer: int, heads: int) -> None:
    """Raise HeadsinkError if this process has a share of a layer's query heads. heads: those that it has."""
    if heads != shape.heads[layer][0]:
        raise HeadsinkError(f"{what}: not with tensor parallelism, where a process has some of the heads")


@contextmanager
def weights_here(module: nn.Module) -> Iterator[None]:
    """Inside the block, put a module's own weights on its execution device. Offloaded weights leave it again afterwards."""
    with align_module_device(module):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                raise HeadsinkError(
                    f"{name} of a {type(module).__name__} is neither in memory nor offloaded by accelerate"
                )
        yield


@contextmanager
def whole_parameter(model: nn.Module, name: str) -> Iterator[Tensor]:
    """Yield one complete parameter of a model. In tensor parallelism all processes must call this in the same order."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    with weights_here(module):
        parameter = getattr(module, attribute).detach()
        yield parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def output_weight(module: nn.Module, kv_heads: int) -> tuple[Tensor, bool]:
    """Return the output projection of an attention module with `kv_heads` KV heads in this process, in float32.

    Returns the columns of those heads, and whether other processes have the rest. Some families (Phi-3, OLMo-2) split the
    projection although every process has all heads; then the parts are joined.
    """
    projection: Any = output_projection(module)
    own: Any = module
    split = kv_heads < heads_of(own.config.per_layer_config[own.layer_idx])[1]
    with weights_here(projection):
        weight = _with_adapter(projection) if hasattr(projection, "base_layer") else projection.weight.detach()
        if isinstance(weight, DTensor):
            weight = weight.to_local() if split else weight.full_tensor()
        if isinstance(projection, Conv1D):  # of GPT-2, [inputs, outputs]
            weight = weight.T
        return weight.float(), split


@torch.no_grad()
def _with_adapter(linear: nn.Module) -> Tensor:
    """Return the effective weight of a linear layer with a PEFT adapter of any kind."""
    plain: Tensor = cast(Any, linear).weight
    rows = torch.eye(plain.shape[1], dtype=plain.dtype, device=plain.device)
    applied: Tensor = linear(rows) - linear(torch.zeros_like(rows[:1]))  # without the bias
    return applied.T


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    total = tensor.contiguous().clone()
    dist.all_reduce(total)
    return total


def gather_heads(tensor: Tensor, heads: int) -> Tensor:
    """Join the shares of a tensor that is split by head along its first dimension. Returns it unchanged if it has all `heads`."""
    if len(tensor) == heads:
        return tensor
    if not dist.is_initialized():
        raise HeadsinkError(f"a layer has {len(tensor)} heads and others have {heads}; not supported")
    share = tensor.contiguous()
    if dist.get_backend() == "nccl":
        share = share.cuda()
    shares = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, share)
    return torch.cat(shares).to(tensor.device)


def rank_heads(kv_heads: int, ranks: int) -> list[list[int]]:
    """Return the KV heads of a layer on each tensor-parallel rank: split, or repeated if there are more ranks than heads."""
    if max(kv_heads, ranks) % min(kv_heads, ranks):
        raise HeadsinkError(f"tensor-parallel: {kv_heads} KV heads cannot be split evenly over {ranks} ranks")
    if kv_heads >= ranks:
        part = kv_heads // ranks
        return [list(range(rank * part, (rank + 1) * part)) for rank in range(ranks)]
    return [[rank * kv_heads // ranks] for rank in range(ranks)]


def is_main() -> bool:
    """Whether this process writes and prints results: rank 0, or any process outside of torchrun."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Wait for all processes (barrier)."""
    if dist.is_initialized():
        dist.barrier()


def input_device(model: nn.Module) -> torch.device:
    """Return the device for token ids: where the embedding computes, even if its weights are offloaded."""
    embedding = cast(Any, model).get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)

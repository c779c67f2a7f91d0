"""Weights and heads that are not all here: offloaded to disk or to another device, or split over processes.

accelerate keeps an offloaded weight away until its own module runs; `weights_here` fetches it before that. In tensor
parallelism every process runs the same text and sees its share of the heads, in order of rank. What is measured head by
head is then joined by `gather_heads`, what is a sum over heads by `sum_over_ranks`. All of this costs nothing where the
model is whole. Processes all belong to one tensor-parallel group, as `headsink.load(tensor_parallel=True)` sets it up.
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

from headsink.errors import HeadsinkError


@contextmanager
def weights_here(module: nn.Module) -> Iterator[None]:
    """Have a module's own weights on the device that it computes on, inside the block only if they are offloaded."""
    with align_module_device(module):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                raise HeadsinkError(
                    f"{name} of a {type(module).__name__} is neither in memory nor offloaded by accelerate"
                )
        yield


@contextmanager
def whole_parameter(model: nn.Module, name: str) -> Iterator[Tensor]:
    """One parameter of a model, whole, wherever it is. In tensor parallelism every process must ask, in one order."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    with weights_here(module):
        parameter = getattr(module, attribute).detach()
        yield parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def output_weight(module: nn.Module, kv_heads: int) -> tuple[Tensor, bool]:
    """The output projection of an attention module that sees `kv_heads` KV heads here, in float32.

    Returns its columns for those heads, and whether other processes have the rest. Some families (Phi-3, OLMo-2) split
    the projection although every process sees all heads: then it is put together.
    """
    projection, config = cast(Any, module).o_proj, cast(Any, module).config
    split = kv_heads < (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    with weights_here(projection):
        weight = _with_adapter(projection) if hasattr(projection, "base_layer") else projection.weight.detach()
        if isinstance(weight, DTensor):
            weight = weight.to_local() if split else weight.full_tensor()
        return weight.float(), split


@torch.no_grad()
def _with_adapter(linear: nn.Module) -> Tensor:
    """The matrix that a linear layer inside an adapter of PEFT multiplies by, of whatever kind the adapter is."""
    plain: Tensor = cast(Any, linear).weight
    rows = torch.eye(plain.shape[1], dtype=plain.dtype, device=plain.device)
    applied: Tensor = linear(rows) - linear(torch.zeros_like(rows[:1]))  # without what is added
    return applied.T


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of what the processes hold of a tensor that is split over them."""
    total = tensor.contiguous().clone()
    dist.all_reduce(total)
    return total


def gather_heads(tensor: Tensor, heads: int) -> Tensor:
    """All `heads` of a tensor that has a share of them along its first dimension; itself if it has them all."""
    if len(tensor) == heads:
        return tensor
    share = tensor.contiguous()
    if dist.get_backend() == "nccl":
        share = share.cuda()
    shares = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, share)
    return torch.cat(shares).to(tensor.device)


def rank_heads(kv_heads: int, ranks: int) -> list[list[int]]:
    """Which KV heads of a layer each tensor-parallel rank has: heads are split, or repeated if there are more ranks."""
    if max(kv_heads, ranks) % min(kv_heads, ranks):
        raise HeadsinkError(f"tensor-parallel: {kv_heads} KV heads cannot be split evenly over {ranks} ranks")
    if kv_heads >= ranks:
        part = kv_heads // ranks
        return [list(range(rank * part, (rank + 1) * part)) for rank in range(ranks)]
    return [[rank * kv_heads // ranks] for rank in range(ranks)]


def is_main() -> bool:
    """Whether this process is the one that writes and shows; every process is, outside of torchrun."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device on which the embedding computes, though its weights may be elsewhere."""
    embedding = cast(Any, model).get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)

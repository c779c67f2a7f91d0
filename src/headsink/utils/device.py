"""Kernels for a GPU, in Triton. Without one Triton's interpreter runs them (TRITON_INTERPRET=1), which is how they are tested."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

DEVICES = {"cuda"}  # device types that the kernels run on; the tests add "cpu", for the interpreter
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def installed() -> bool:
    """Whether there is what the kernels need. PyTorch for CUDA brings it."""
    return find_spec("triton") is not None


def on_card(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on a device, without the host waiting for what the device is doing."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def index(heads: list[int], device: torch.device) -> list[int] | slice | Tensor:
    """Heads as an index into tensors of a device. A list makes the host wait for a GPU each time."""
    if device.type not in DEVICES:
        return heads
    if heads == list(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return on_card(torch.tensor(heads), device)


def can_run(tensor: Tensor) -> bool:
    """Whether the kernels take tensors like this one."""
    return (
        tensor.device.type in DEVICES
        and tensor.dtype in TYPES
        and installed()
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )

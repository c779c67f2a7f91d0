"""Whether the Triton kernels can run on a tensor, and copies to a device that do not block the host.

Without a GPU, Triton's interpreter can run the kernels (TRITON_INTERPRET=1). The tests do so.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

DEVICES = {"cuda"}  # device types that the kernels run on; the tests add "cpu" for the interpreter
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def triton_installed() -> bool:
    """Whether Triton is installed. PyTorch for CUDA includes it."""
    return find_spec("triton") is not None


def on_card(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device without waiting for the device."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def index(heads: list[int], device: torch.device) -> list[int] | slice | Tensor:
    """Return head numbers as an index into tensors on a device. Indexing with a list would make the host wait for a GPU."""
    if device.type not in DEVICES:
        return heads
    if heads == list(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return on_card(torch.tensor(heads), device)


def can_run(tensor: Tensor) -> bool:
    """Whether the kernels support the device and dtype of this tensor. Tensors that need gradients are not supported."""
    return (
        tensor.device.type in DEVICES
        and tensor.dtype in TYPES
        and triton_installed()
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )

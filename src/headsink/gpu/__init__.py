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


def can_run(tensor: Tensor) -> bool:
    """Whether the kernels take tensors like this one."""
    return (
        tensor.device.type in DEVICES
        and tensor.dtype in TYPES
        and installed()
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )

"""Parse names of dtypes and devices."""

from __future__ import annotations

import torch

from headsink.errors import HeadsinkError
from headsink.models.builtin import check_dtype
from headsink.models.hf_logging import first_line


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        found: torch.dtype = getattr(torch, check_dtype(dtype))
        return found
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as float32."""
    return str(dtype).removeprefix("torch.")


def parse_device(device: str | torch.device | None) -> torch.device:
    """Return an available device; by default CUDA if there is a GPU. Raises HeadsinkError if it is not available."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise HeadsinkError(f"device: {str(device)!r} is not available here: {first_line(error)}") from error
    return device

"""Names of dtypes and devices."""

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
    """ "float32" and the like, as `parse_dtype` reads it."""
    return str(dtype).removeprefix("torch.")


def parse_device(device: str | torch.device | None) -> torch.device:
    """A device that is here; the best one if none is named."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise HeadsinkError(f"device: {str(device)!r} is not available here: {first_line(error)}") from error
    return device

"""Arrays in an HTML page: one compressed binary block in base64, which the browser unpacks without a library (report/common.js).

It has a tenth of the size of JSON.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FAINTEST = 2.0**-20  # attention below this is shown as 0
STEPS = 254  # steps of the logarithmic scale of attention from FAINTEST to 1: 5.6 % each
TYPES = {torch.float32: "f4", torch.int32: "i4", torch.uint16: "u2", torch.uint8: "u1"}


def one_byte(attention: Tensor) -> Tensor:
    """Attention on a logarithmic scale: uint8, 0 for less than FAINTEST, 1 + STEPS for 1."""
    shade = 1 + STEPS * (1 - attention.float().clamp(min=FAINTEST / 2).log2() / torch.tensor(FAINTEST).log2())
    return torch.where(attention < FAINTEST, 0, shade.round().clamp(1, 1 + STEPS)).to(torch.uint8)


def three_figures(array: Tensor) -> Tensor:
    """float32 with 11 bits of precision, enough for display, which compresses to half the size."""
    return ((array.float().contiguous().view(torch.int32) + 0x800) & -0x1000).view(torch.float32)


def two_figures(array: Tensor) -> Tensor:
    """float32 with 8 bits of precision, enough for the points of a chart."""
    return ((array.float().contiguous().view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)


def pack(arrays: Mapping[str, Tensor], **more: Any) -> str:
    """Pack arrays and JSON values (`more`) as text: length of the header, header, numbers; gzip; base64.

    float32 has 3 significant figures, and its four bytes lie in four runs.
    """
    parts, offset, entries = [], 0, {}
    for name, array in arrays.items():
        if array.is_floating_point():
            array = three_figures(array)
        elif array.dtype not in TYPES:
            array = array.int()
        raw = array.contiguous().numpy().tobytes()
        if array.dtype == torch.float32:  # first bytes, second bytes, ...: they compress better apart
            raw = b"".join(raw[n::4] for n in range(4))
        entries[name] = [TYPES[array.dtype], offset, list(array.shape)]
        parts.append(raw + b"\0" * (-len(raw) % 4))
        offset += len(parts[-1])
    header = json.dumps({"arrays": entries} | more, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 4)  # typed arrays must begin at multiples of 4
    whole = len(header).to_bytes(4, "little") + header + b"".join(parts)
    return base64.b64encode(gzip.compress(whole, 6, mtime=0)).decode()

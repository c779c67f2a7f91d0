"""Attention tile by tile against the definition, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headsink.attention.backends import backend_of
from headsink.attention.cpu import tiles
from headsink.attention.params import AttentionParams
from headsink.attention.visibility import KeyVisibility

TYPES = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


def slow(
    query: Tensor, keys: Tensor, values: Tensor, columns: Tensor, until: Tensor, first: int, scaling: float
) -> Tensor:
    """query: [heads, group, tokens, dim]. Returns the same in float64."""
    now = first + torch.arange(query.shape[2])[:, None]
    seen = (columns <= now) & (now < until[:, None])
    logits = torch.einsum("hgtd,hkd->hgtk", query.double(), keys.double()) * scaling
    shares = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return shares @ values.double()[:, None]


@pytest.fixture(params=[True, False], ids=["paired", "single"])
def paired(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With instructions for products of bfloat16 pairs, and without them."""
    if request.param and not tiles.PAIRED:
        pytest.skip("this processor has no AVX512-BF16")
    monkeypatch.setattr(tiles, "PAIRED", request.param)


@pytest.mark.usefixtures("paired")
@pytest.mark.parametrize("dtype", TYPES)
@settings(max_examples=60)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 5, 300, 400))),
    dim=st.sampled_from([2, 6, 8, 16, 40, 64, 80, 128]),
    batch=st.integers(1, 2),
    size=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**32),
)
def test_tiles_are_attention(
    dtype: torch.dtype, shape: tuple[int, int, int, int], dim: int, batch: int, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    heads, group, tokens, n_keys = shape
    query = (torch.randn(batch, heads * group, tokens, dim) * size).to(dtype)
    keys, values = (torch.randn(batch * heads, n_keys, dim).to(dtype) for _ in range(2))
    prefix_slots, start = int(torch.randint(0, n_keys + 1, ())), int(torch.randint(0, 9, ()))
    columns = torch.arange(n_keys) + (start - prefix_slots)
    columns[:prefix_slots] = -1
    until = torch.randint(0, n_keys + 2, (batch * heads, n_keys))
    until[torch.rand(until.shape) < torch.rand(())] = 2**30
    first = int(torch.randint(0, n_keys + 1, ()))
    sight = KeyVisibility(until, first, prefix_slots, start, None, True, n_keys, n_keys)
    found = backend_of("cpu").prefill(query, keys, values, sight, AttentionParams(dim**-0.5))
    expected = slow(query.view(batch * heads, group, tokens, dim), keys, values, columns, until, first, dim**-0.5)
    error = TYPES[dtype] * max(
        1.0, size if dtype == torch.float32 else 1.0
    )  # the error of float32 logits grows with their size
    torch.testing.assert_close(found.double(), expected.view_as(query), atol=error, rtol=error)


@pytest.mark.usefixtures("paired")
@pytest.mark.parametrize("dtype", TYPES)
def test_nan_stays_nan(dtype: torch.dtype) -> None:
    query, (keys, values) = torch.randn(1, 2, 70, 16).to(dtype), torch.randn(2, 1, 70, 16).to(dtype)
    query[0, 1, 30, 3] = float("nan")
    sight = KeyVisibility(torch.full((1, 70), 70), 0, 0, 0, None, False, 0, 0)
    found = backend_of("cpu").prefill(query, keys, values, sight, AttentionParams(1.0)).isnan()
    assert found[0, 1, 30].all()
    assert found.sum() == 16

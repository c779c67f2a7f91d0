"""GPU kernels of the census: equal to the blockwise statistics (test_census.py compares those with whole matrices)."""

from dataclasses import fields

import offline
import pytest
import torch
from transformers import LlamaConfig

from headsink.attention.chunked import attention
from headsink.attention.interface import AttentionRecord
from headsink.attention.params import Inputs
from headsink.census.head_statistics import Thresholds, head_statistics
from headsink.utils import device as gpu

census = pytest.importorskip("headsink.attention.cuda.statistics")  # triton may not be installed
bands = pytest.importorskip("headsink.attention.cuda.bands")
LIMITS = Thresholds(first=2, secondary=9, tau=0.8, window=9)
CASES = {
    "group-of-two": {"length": 77},
    "group-of-three": {"length": 77, "kv_heads": 1, "group": 3, "sink_logits": True},
    "mha-80": {"length": 77, "kv_heads": 3, "group": 1, "dim": 80},
    "sliding": {"length": 77, "sliding": 20, "sink_logits": True},
    "capped": {"length": 50, "softcap": 3.0, "dim": 96},
    "few-queries": {"length": 300, "kv_heads": 1, "queries": 21},
    "few-queries-sliding": {"length": 300, "kv_heads": 1, "queries": 21, "sliding": 130},
    "two-tokens": {"length": 2},
    "float16": {"length": 77, "dtype": torch.float16},
    "bfloat16": {"length": 150, "dtype": torch.bfloat16, "softcap": 20.0},
}


def seen(
    device,
    length,
    kv_heads=2,
    group=2,
    dim=16,
    dtype=torch.float32,
    sliding=None,
    softcap=None,
    sink_logits=False,
):
    """Return random attention inputs of a layer: more tokens than are read, some with a small value norm."""
    heads, more = kv_heads * group, length + 3

    def tokens(count):
        return torch.randn(1, more, count, dim).transpose(1, 2)  # the memory layout of a projection's output

    query, key, value = 2 * tokens(heads), tokens(kv_heads), tokens(kv_heads)
    value *= torch.where(torch.rand(1, kv_heads, more, 1) < 0.1, 0.1, 1.0)
    module = torch.nn.Module()
    module.o_proj = torch.nn.Linear(heads * dim, 32, bias=False).to(device)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}
    module.config, module.layer_idx = LlamaConfig(**sizes, hidden_size=heads * dim), 0
    query, key, value = (t.to(device, dtype) for t in (query, key, value))
    logits = torch.randn(heads).to(device) if sink_logits else None
    inputs = Inputs(module, 0, query, key, value, dim**-0.5, sliding, softcap, logits)
    return AttentionRecord(**vars(inputs), output=attention(inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_blockwise_statistics(name, device, monkeypatch):
    case = dict(CASES[name])
    length, queries = case["length"], case.pop("queries", 512)
    layer = seen(device, **case)
    monkeypatch.setattr(bands, "WIDEST", 50)
    ran = []
    monkeypatch.setattr(census, "masses", lambda *a, masses=census.masses: ran.append(1) or masses(*a))
    found = head_statistics(layer, length, LIMITS, queries)
    assert ran
    monkeypatch.setattr(gpu, "DEVICES", set())
    expected = head_statistics(layer, length, LIMITS, queries)
    assert expected.secondary.any() or length < 3
    rounded = case.get("dtype", torch.float32) != torch.float32
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        of_values = rounded and "errors" in field.name  # weights are rounded like the values before the product
        near = {"rtol": 2e-2, "atol": 1e-4} if of_values else {"rtol": 1e-5, "atol": 1e-5}
        for key, numbers in other.items() if isinstance(other, dict) else [(None, other)]:
            torch.testing.assert_close(
                one if key is None else one[key],
                numbers,
                equal_nan=True,
                **near,
                msg=lambda text, what=(field.name, key): f"{what}: {text}",
            )


@pytest.mark.slow
def test_runs_are_repeatable(device):
    layer = seen(device, 24)
    one, other = (head_statistics(layer, 24, LIMITS) for _ in range(2))
    assert torch.equal(one.attention, other.attention)
    assert torch.equal(one.profile, other.profile)


SCRIPT = """
import torch
from headsink.attention.chunked import Inputs
from headsink.attention.cuda import statistics as census

length = 2048
for dtype in (torch.bfloat16, torch.float32):
    query, key, value = (torch.zeros(1, length, heads, 128, dtype=dtype).transpose(1, 2) for heads in (32, 8, 8))
    inputs = Inputs(None, 0, query, key, value, 128**-0.5)
    rows, sinks = torch.arange(512, length, 64), torch.zeros(8, length, dtype=torch.bool)
    census.masses(inputs, rows, torch.ones(len(rows)), sinks, 128, [2**n for n in range(12)])
    census.pattern_outputs(inputs, rows, sinks, 4, [0, *(2**n for n in range(4, 11))])
"""


@pytest.mark.slow
def test_kernels_fit_a_multiprocessor(tmp_path):
    kernels = offline.compiled(SCRIPT, tmp_path)
    assert [kernel["name"] for kernel in kernels] == 2 * ["_sum_bands", "_sum_rows", "_sum_bands"]
    for kernel in kernels:
        assert kernel["spilled"] == 0
        assert kernel["shared"] <= 100 * 1024  # two programs per multiprocessor

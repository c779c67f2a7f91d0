"""The parts of the compiled decode step, each against torch or numpy."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numba import njit

from headsink.attention import formats
from headsink.attention.cpu import decode, elements
from headsink.attention.cpu.backend import NUMPY
from headsink.attention.formats import INT4, INT8
from headsink.attention.kv_table import KVField
from headsink.decoding import kernel as step_kernel
from headsink.decoding.fields import Field
from headsink.eviction.scorers import LINEAR

RANDOM = np.random.default_rng(0)


def test_powers_of_e():
    x = np.linspace(-87, 88, 200_001, dtype=np.float32)

    @njit
    def every(x, out):
        for n in range(len(x)):
            out[n] = elements.exp(x[n])

    out = np.empty_like(x)
    every(x, out)
    np.testing.assert_allclose(out, np.exp(x.astype(np.float64)), rtol=3e-7)
    every(np.array([-1e30, -np.inf], np.float32), out[:2])
    assert out[:2].max() < 1e-37


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversions_round_as_torch_does(dtype):
    values = torch.tensor(RANDOM.standard_normal(5000).astype(np.float32)) * 10.0 ** torch.randint(-30, 30, (5000,))
    like = np.empty(0, np.uint16 if dtype == torch.bfloat16 else np.float32)

    @njit
    def round_trip(x, narrow, wide, like):
        for n in range(len(x)):
            narrow[n] = elements.narrow(x[n], like)
            wide[n] = elements.wide(narrow[n])

    narrow, wide = np.empty(5000, like.dtype), np.empty(5000, np.float32)
    round_trip(values.numpy(), narrow, wide, like)
    expected = values.to(dtype)
    assert torch.equal(torch.from_numpy(wide), expected.float())
    if dtype == torch.bfloat16:
        assert np.array_equal(narrow, expected.view(torch.uint16).numpy())


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (7, 33), (64, 576)])
@pytest.mark.parametrize("texts", [1, 2, 4, 7])
def test_matrix_vector_products(shape, dtype, parts, texts):
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0])
    x, out = torch.randn(texts, shape[1]), np.full((texts, shape[0] + 3), np.nan, np.float32)
    like = np.empty(0, np.uint16 if dtype == torch.bfloat16 else np.float32)
    for added, scale in ((None, 1), (bias, 0.5)):
        fields = {
            Field.INPUT: x.data_ptr(),
            Field.OUTPUT: out.ctypes.data,
            Field.WIDTH: shape[0],
            Field.COLUMNS: shape[1],
            Field.STRIDE: shape[0] + 3,
            Field.WEIGHT: weight.data_ptr(),
            Field.BIAS: 0 if added is None else added.data_ptr(),
        }
        operation = np.zeros(len(Field), np.int64)
        operation[list(fields)] = list(fields.values())
        for part in range(parts):
            step_kernel._linear(operation, np.float32(scale), like, texts, *decode.share(shape[0], part, parts))
        expected = scale * (x @ weight.float().T + (0 if added is None else added))
        torch.testing.assert_close(torch.from_numpy(out[:, : shape[0]]), expected, rtol=1e-5, atol=2e-5)
        assert np.isnan(out[:, shape[0] :]).all()


@pytest.mark.parametrize("dim", [2, 6, 64])
def test_scores_of_keys(dim):
    key, value, weights = torch.randn(dim), torch.randn(dim), torch.randn(1, LINEAR.n_features(dim))
    for kind in ("auto", "int8", "k8v4") if dim % 32 == 0 else ("auto",):
        rows, numbers, likes = cached(key, value, kind, torch.float32)

        @njit
        def score(key, value, weights, dim, key_like, value_like):
            return decode._score(key, value, weights, dim, key_like, value_like)

        found = score(*(row.numpy() for row in rows), weights[0].numpy(), dim, *likes)
        expected = LINEAR.scores(*(one[None, None] for one in numbers), weights)
        assert found == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def cached(key, value, kv_dtype, dtype):
    """Keys and values, [..., dim], as a cache holds them, as float32 again, and empty arrays of their dtypes."""
    rows = formats.encode(kv_dtype, key.to(dtype), value.to(dtype))
    numbers = [one.float() for one in formats.decode(kv_dtype, *rows, torch.float32)]
    return rows, numbers, [np.empty(0, NUMPY[one.dtype]) for one in rows]


@pytest.mark.parametrize("dim", [4, 20, 64, 80])
def test_keys_are_rounded_to_8_bits_as_in_torch(dim):
    numbers = torch.randn(500, dim) * 10.0 ** torch.randint(-20, 20, (500, 1))
    numbers[3] = 0
    found = np.empty((500, dim + 4), np.int8)

    @njit
    def encode(numbers, like, rows):
        for n in range(len(rows)):
            elements.encode(numbers[n], like, rows[n])

    encode(numbers.numpy(), found[0, :0], found)
    expected = INT8.quantize(numbers)
    difference = (torch.from_numpy(found)[:, :-4].int() - expected[:, :-4].int()).abs()
    assert difference.max() <= 1
    assert difference.sum() <= 2
    torch.testing.assert_close(
        *(torch.as_tensor(t)[:, -4:].contiguous().view(torch.float32) for t in (found, expected))
    )


@pytest.mark.parametrize("dim", [32, 64, 96])
def test_values_are_rounded_to_4_bits_as_in_torch(dim):
    numbers = torch.randn(500, dim) * 10.0 ** torch.randint(-20, 20, (500, 1)) + torch.randint(-3, 4, (500, 1))
    numbers[3], numbers[4] = 0, -7
    found, unpacked = np.empty((500, INT4.width(dim)), np.uint8), np.empty((500, dim), np.float32)

    @njit
    def encode(numbers, like, rows, unpacked):
        for n in range(len(rows)):
            elements.encode(numbers[n], like, rows[n])
            elements.unpack(rows[n].ctypes.data, numbers.shape[1], unpacked[n])

    encode(numbers.numpy(), found[0, :0], found, unpacked)
    expected = INT4.quantize(numbers)
    factors = [t[:, dim // 2 :].contiguous().view(torch.uint16).int() for t in (torch.from_numpy(found), expected)]
    assert (factors[0] - factors[1]).abs().max() <= 1
    others = (torch.from_numpy(found) != expected).any(1)
    assert others.sum() <= 5  # scales and numbers next to the middle of two
    torch.testing.assert_close(
        torch.from_numpy(unpacked), INT4.dequantize(torch.from_numpy(found), torch.float32), rtol=1e-6, atol=0
    )
    groups = numbers.unflatten(1, (-1, 32))
    error = (INT4.dequantize(expected, torch.float32) - numbers).abs().unflatten(1, (-1, 32)).amax(-1)
    # half a step, and that of the zero point's 8 bits
    assert (error <= (groups.amax(-1) - groups.amin(-1)) / 29.5 + groups.abs().amax(-1) / 128 / 29).all()


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 5, 301])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "dim"),
    [(kind, "auto", dim) for kind in (torch.float32, torch.bfloat16) for dim in (12, 16, 80)]
    + [(torch.float32, "int8", dim) for dim in (12, 16, 80)]
    + [(torch.float32, "k8v4", dim) for dim in (32, 96)],
)
@pytest.mark.parametrize(("turned_sinks", "tokens"), [(False, 1), (True, 1), (False, 2), (False, 5)])
def test_attention_in_parts(size, parts, dtype, kv_dtype, dim, turned_sinks, tokens):
    group = 3 * tokens
    (key_rows, value_rows), (keys, values), likes = cached(*torch.randn(2, size, dim), kv_dtype, dtype)
    query = torch.randn(group, dim) * 2
    visible = torch.rand(size) < 0.7 if size > 2 else torch.tensor([False] * (size - 1) + [True])
    head = np.zeros(len(KVField), np.int64)
    head[[KVField.KEYS, KVField.VALUES, KVField.VISIBLE]] = [t.data_ptr() for t in (key_rows, value_rows, visible)]
    head[KVField.END] = size
    top, total = np.full((2, parts, group), np.nan, np.float32)
    out, result = np.full((parts, group, dim), np.nan, np.float32), np.empty((group, dim), np.float32)
    logits = np.empty((group + 1, decode.BLOCK), np.float32)
    sinks = min(2, size) if turned_sinks else 0
    head[KVField.SINK] = sinks
    rotated = torch.randn(group if turned_sinks else 0, dim)
    cap, sink = np.float32(size % 2 * 3), np.float32(-np.inf if size % 3 else 0.5)
    given = query.numpy(), rotated.numpy(), tokens, cap, logits
    for part in range(parts):
        decode.attend_part(head, *likes, *given, top[part], total[part], out[part], part, parts)
    for row in range(group):
        decode.combine(top[:, row], total[:, row], out[:, row], sink, result[row])
    every = query @ keys.T
    if turned_sinks:
        every[:, :sinks] = rotated @ keys[:sinks].T
    mask = visible & (torch.arange(size) <= size - tokens + torch.arange(group)[:, None] % tokens)
    every = torch.tanh(every / cap) * cap if cap else every
    every = torch.cat([every.masked_fill(~mask, float("-inf")), torch.full((group, 1), float(sink))], 1)
    shares = every.softmax(-1).nan_to_num(0.0)[:, :-1]
    torch.testing.assert_close(torch.from_numpy(result), shares @ values, rtol=3e-5, atol=3e-5)


def test_a_head_that_sees_nothing_gives_zero():
    result = np.full(4, np.nan, np.float32)
    parts = np.full(2, -np.inf, np.float32), np.zeros(2, np.float32), np.zeros((2, 4), np.float32)
    decode.combine(*parts, np.float32(-np.inf), result)
    assert not result.any()


THREADS = """
import torch
from headsink.attention.backends import AttentionParams, backend_of
torch.set_num_threads({threads})
query, keys = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8)
backend_of("cpu").decode(query, keys, keys, torch.ones(1, 2, 5, dtype=torch.bool), 5, AttentionParams(1.0))
import numba
print(torch.get_num_threads(), numba.get_num_threads())
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_compiled_calls_do_not_change_torch_threads(threads):
    """In a fresh process, because the first call starts numba's threads."""
    command = [sys.executable, "-c", THREADS.format(threads=threads)]
    environment = os.environ | {"NUMBA_NUM_THREADS": "2"}
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert found.split() == [str(threads), str(min(threads, 2))]

"""The enumerations of decoding/fields.py as numbers, and the buffers of a decode step as arrays, for its kernels.

numba does not support enumerations as array indices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from headsink.attention.cpu.elements import FLOATS, pointer
from headsink.attention.kv_table import KVField
from headsink.decoding.fields import Activation, Field, NormKind, Number, Op, Scores

OP, TOGETHER, INPUT, OUTPUT, WIDTH, COLUMNS, STRIDE, WEIGHT, BIAS, KIND, PERIOD, *ATTEND = (
    int(field) for field in Field
)
QUERY, KEY, VALUE, FIRST, KV_HEADS, GROUP, COS, SIN, PAIRS, INTERLEAVED, *REST = ATTEND
QUERY_NORM, KEY_NORM, LATE, SINKS, TURN, CHOSEN, SHARES, TOP_K = REST
SCALE, EPS, CAP_AT, BETA = (number.value for number in Number)
NORM, ATTEND_OP, ROUTE, LINEAR, GATE, ACTIVATE, ADD, CAP, *MORE = (int(op) for op in Op)
EXPERTS_IN, EXPERTS_OUT, EXPERTS_IN_T, EXPERTS_OUT_T, XIELU = MORE
SILU, GELU_TANH, GELU, RELU, RELU_SQUARED, SIGMOID = (int(kind) for kind in Activation)
END = int(KVField.END)
RMS, LAYER = (int(kind) for kind in NormKind)
SOFTMAX, _ = (int(kind) for kind in Scores)
INTEGERS = np.empty(0, np.int64)


@njit
def floats(address: Any, shape: Any) -> Any:
    """Return float32 numbers at an address as an array."""
    return carray(pointer(address, FLOATS), shape)

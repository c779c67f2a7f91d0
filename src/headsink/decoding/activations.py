"""Activation functions of a compiled decode step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from headsink.attention.cpu.elements import FAST, exp
from headsink.decoding.codes import BETA, CAP_AT, EPS, GELU, GELU_TANH, RELU, SCALE, SIGMOID, SILU


@njit(fastmath=FAST)
def activation(x: Any, kind: Any) -> Any:
    if kind == SILU:
        return x / (np.float32(1) + exp(-x))
    if kind == GELU_TANH:
        inner = np.float32(1.5957691216057308) * (x + np.float32(0.044715) * x * x * x)
        return x / (np.float32(1) + exp(-inner))
    if kind == GELU:
        return x * np.float32(0.5 * (1 + math.erf(x * 0.7071067811865476)))
    if kind == SIGMOID:
        return np.float32(1) / (np.float32(1) + exp(-x))
    positive = max(x, np.float32(0))
    return positive if kind == RELU else positive * positive


@njit(fastmath=FAST)
def xielu(x: Any, numbers: Any) -> Any:
    linear = numbers[BETA] * x
    if x > 0:
        return numbers[SCALE] * x * x + linear
    return np.float32(numbers[CAP_AT] * (math.expm1(min(x, numbers[EPS])) - x) + linear)

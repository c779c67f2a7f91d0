"""The table of operations that the compiled decode step on a CPU runs: operations, columns, and what their numbers mean.

decoding/program.py makes the table, decoding/kernel.py runs it.
"""

from __future__ import annotations

from enum import Enum, IntEnum


class Op(IntEnum):
    """An operation. Those from LINEAR on compute columns independently, so threads share several without waiting."""

    NORM = 0  # output = norm(input), in groups of columns
    ATTEND = 1  # append a token to the heads of a layer, and attend to them
    ROUTE = 2  # choose the experts of a token
    LINEAR = 3  # output = scale x (weight input + bias)
    GATE = 4  # output *= activation(input)
    ACTIVATE = 5  # output = activation(output)
    ADD = 6  # output += scale x input
    CAP = 7  # output = scale x tanh(output / scale)
    EXPERTS_IN = 8  # output = activation(gate input) x (up input), of the experts of a token
    EXPERTS_OUT = 9  # output = sum of their outputs
    EXPERTS_IN_T = 10  # output = clamped SwiGLU, of experts with transposed weights and interleaved gates (gpt-oss)
    EXPERTS_OUT_T = 11  # output = sum of their outputs
    XIELU = 12  # output = xIELU(output)


class Field(IntEnum):
    """A column of the table of operations. Addresses of buffers, float32 [rows, columns], and of weights.

    TOGETHER: operations in this parallel region. INPUT, OUTPUT: addresses of buffers. WIDTH: columns of the output. COLUMNS:
    columns of the input, or of a group (NORM). STRIDE: columns of the output's buffer. WEIGHT, BIAS: addresses, 0 for none. KIND:
    `Activation`, `NormKind` or `Scores`. PERIOD: rows of the weight of a norm; groups use them in turn.

    ATTEND: QUERY, KEY, VALUE: addresses of buffers. FIRST: the row of the layer's first head in the table of heads. KV_HEADS,
    GROUP, COLUMNS: KV heads, query heads per KV head, head size. COS, SIN: addresses, [rows, PAIRS]. INTERLEAVED:
    coordinates 2n and 2n + 1 rotate together, not n and n + pairs. QUERY_NORM, KEY_NORM: addresses of [PERIOD, head size], 0 for
    none. LATE: norms come after the rotation. SINKS: address of a logit per query head, 0 for none. TURN: row of the layer in
    `turns`, -1.

    ROUTE, EXPERTS_*: CHOSEN, SHARES: addresses of int64 and float32 [rows, TOP_K]. WIDTH of ROUTE: number of experts. BIAS
    of ROUTE: added to the scores for the choice only. LATE of ROUTE: shares are divided by their sum.
    """

    OP = 0
    TOGETHER = 1
    INPUT = 2
    OUTPUT = 3
    WIDTH = 4
    COLUMNS = 5
    STRIDE = 6
    WEIGHT = 7
    BIAS = 8
    KIND = 9
    PERIOD = 10
    QUERY = 11
    KEY = 12
    VALUE = 13
    FIRST = 14
    KV_HEADS = 15
    GROUP = 16
    COS = 17
    SIN = 18
    PAIRS = 19
    INTERLEAVED = 20
    QUERY_NORM = 21
    KEY_NORM = 22
    LATE = 23
    SINKS = 24
    TURN = 25
    CHOSEN = 26
    SHARES = 27
    TOP_K = 28


class Number(Enum):
    """A column of the float32 numbers of operations.

    SCALE: a factor; EPS: of a norm; CAP: soft cap of attention, 0 for none. EXPERTS_IN_T: SCALE and CAP are alpha and the limit
    of its SwiGLU. XIELU: SCALE and CAP are alpha of positive and of negative numbers; EPS, BETA.
    """

    SCALE = 0
    EPS = 1
    CAP = 2
    BETA = 3


class Activation(IntEnum):
    SILU = 0
    GELU_TANH = 1
    GELU = 2
    RELU = 3
    RELU_SQUARED = 4
    SIGMOID = 5


class NormKind(IntEnum):
    RMS = 0
    LAYER = 1


class Scores(IntEnum):
    """Of experts, from the router's logits."""

    SOFTMAX = 0
    SIGMOID = 1

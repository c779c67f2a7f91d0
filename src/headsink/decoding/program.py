"""The program of the compiled decode step on a CPU: the table of operations of a model."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from headsink.decoding.fields import Activation, Field, Number, Op
from headsink.decoding.forms import Norm, Xielu
from headsink.decoding.parts import MLP, Attention, Block, Experts, Linear, Parts


class Program:
    """The operations of up to `tokens` tokens per sequence, and the buffers that they read and write.

    operations: int64 [operations, len(Field)]; numbers: float32 [operations, len(Number)] (`kernel.run`). Buffers have a row for
    each token of each sequence. hidden: float32 [rows, hidden], the embeddings; logits: float32 [rows, vocabulary]. angles: for
    every kind of layer, cos and sin of the position, float32 [rows, pairs] each. first: row of every layer's first head in the
    table of heads. scratch: float32 numbers that a thread needs for one token per sequence.
    """

    def __init__(self, parts: Parts, sequences: int, tokens: int, pairs: dict[str, int], turned: list[int]):
        self.parts, self.sequences, self.tokens = parts, sequences, tokens
        self._rows: list[dict[Any, Any]] = []
        self._kept: list[Any] = [parts]  # memory that addresses point to
        heads, hidden = parts.shape.heads, len(parts.blocks[0].attention.output.weight)
        self.hidden, self.logits = self._buffer(hidden), self._buffer(len(parts.head.weight))
        self._input, self._added, self._other = (self._buffer(hidden) for _ in range(3))
        self._mlp_input = self._buffer(hidden)
        widths = [(query * dim, kv * dim, kv * dim) for query, kv, dim in heads]
        self._query, self._key, self._value = (self._buffer(max(own)) for own in zip(*widths, strict=True))
        self._attended, self._head_gate = (
            self._buffer(max(w[0] for w in widths)),
            self._buffer(max(w[0] for w in widths)),
        )
        inner = max(
            _inner(mlp) * (mlp.top_k if isinstance(mlp, Experts) else 1) for b in parts.blocks for mlp in b.mlps
        )
        self._gate, self._up, self._share = self._buffer(inner), self._buffer(inner), self._buffer(1)
        routed = [mlp for b in parts.blocks for mlp in b.mlps if isinstance(mlp, Experts)]
        most = max((mlp.top_k for mlp in routed), default=1)
        self._router = self._buffer(max((len(mlp.gate_up) for mlp in routed), default=1))
        self._chosen, self._shares = np.empty((sequences * tokens, most), np.int64), self._buffer(most)
        self.angles = {kind: (self._buffer(count), self._buffer(count)) for kind, count in pairs.items()}
        counts = [sequences * kv_heads for _, kv_heads, _ in heads]
        self.first = np.cumsum([0, *counts])
        for layer, block in enumerate(parts.blocks):
            self._add_block(block, layer, turned.index(layer) if layer in turned else -1)
        self._add_norm(parts.norm, self.hidden, self._input, hidden)
        self._region([self._linear(parts.head, self._input, self.logits, parts.logit_scale), *self._cap(self.logits)])
        self.operations = np.zeros((len(self._rows), len(Field)), np.int64)
        self.numbers = np.zeros((len(self._rows), len(Number)), np.float32)
        for row, values in enumerate(self._rows):
            for field, value in values.items():
                if isinstance(field, Number):
                    self.numbers[row, field.value] = value
                else:
                    self.operations[row, field] = value
        self.scratch = max(
            count * (query // kv) * (dim + 2) for count, (query, kv, dim) in zip(counts, heads, strict=True)
        )

    def _buffer(self, columns: int) -> Any:
        buffer = np.zeros((self.sequences * self.tokens, columns), np.float32)
        self._kept.append(buffer)
        return buffer

    def _floats(self, tensor: Tensor | None) -> int:
        """The address of float32 numbers, 0 for None."""
        if tensor is None:
            return 0
        own = tensor.detach().float().contiguous()
        self._kept.append(own)
        return own.data_ptr()

    def _region(self, rows: list[dict[Any, Any]]) -> None:
        """Add operations that compute the same columns, one after the other."""
        for left, row in zip(range(len(rows), 0, -1), rows, strict=True):
            self._rows.append({Field.TOGETHER: left, **row})

    def _linear(
        self, linear: Linear, x: Any, out: Any, scale: float = 1.0, first: int = 0, stride: int | None = None
    ) -> dict[Any, Any]:
        """An operation that writes columns of `out` from `first` on. stride: columns per sequence, None: those of the matrix."""
        rows, columns = linear.weight.shape
        return {
            Field.OP: Op.LINEAR,
            Field.INPUT: x.ctypes.data,
            Field.OUTPUT: out.ctypes.data + 4 * first,
            Field.WIDTH: rows,
            Field.COLUMNS: columns,
            Field.STRIDE: rows if stride is None else stride,
            Field.WEIGHT: linear.weight.data_ptr(),
            Field.BIAS: self._floats(linear.bias),
            Number.SCALE: scale,
        }

    def _columns(self, op: Op, x: Any, out: Any, width: int, columns: int | None = None, **more: Any) -> dict[Any, Any]:
        return {
            Field.OP: op,
            Field.INPUT: x.ctypes.data,
            Field.OUTPUT: out.ctypes.data,
            Field.WIDTH: width,
            Field.COLUMNS: width if columns is None else columns,
            Field.STRIDE: width,
            Field.KIND: more.get("kind", 0),
            Number.SCALE: more.get("scale", 1.0),
        }

    def _cap(self, out: Any) -> list[dict[Any, Any]]:
        cap, width = self.parts.logit_cap, out.shape[1]
        return [self._columns(Op.CAP, out, out, width, scale=cap)] if cap else []

    def _add_norm(self, norm: Norm, x: Any, out: Any, width: int, group: int | None = None) -> None:
        """Normalise buffers of `width` columns, in groups of `group` columns unless the norm has a weight of another size."""
        columns = (group or width) if norm.weight is None else norm.weight.shape[-1]
        period = len(norm.weight) if norm.weight is not None and norm.weight.dim() == 2 else 1
        self._region(
            [
                self._columns(Op.NORM, x, out, width, columns, kind=norm.kind)
                | {
                    Field.WEIGHT: self._floats(norm.weight),
                    Field.BIAS: self._floats(norm.bias),
                    Field.PERIOD: period,
                    Number.EPS: norm.eps,
                }
            ]
        )

    def _add_block(self, block: Block, layer: int, turn: int) -> None:
        hidden, x, multiplier = self.hidden.shape[1], self.hidden, block.multiplier
        given = x
        if block.before_attention is not None:
            self._add_norm(block.before_attention, x, self._input, hidden)
            given = self._input
        mlp_given = given
        if block.parallel and block.before_mlp is not None:
            self._add_norm(block.before_mlp, x, self._mlp_input, hidden)
            mlp_given = self._mlp_input
        self._add_attention(block.attention, given, layer, turn)
        output = self._linear(block.attention.output, self._attended, self._added)
        self._add_residual([output], block.after_attention, multiplier)
        if not block.parallel:
            mlp_given = x
            if block.before_mlp is not None:
                self._add_norm(block.before_mlp, x, self._input, hidden)
                mlp_given = self._input
        for number, mlp in enumerate(block.mlps):
            out, last = self._other if number else self._added, number == len(block.mlps) - 1
            own = self._experts(mlp, mlp_given, out) if isinstance(mlp, Experts) else self._mlp(mlp, mlp_given, out)
            rows = [own, *([self._columns(Op.ADD, self._other, self._added, hidden)] if number else [])]
            if last:
                self._add_residual(rows, block.after_mlp, multiplier)
            else:
                self._region(rows)
        if block.scalar != 1:
            self._region([self._columns(Op.ADD, x, x, hidden, scale=block.scalar - 1)])

    def _add_residual(self, rows: list[dict[Any, Any]], norm: Norm | None, multiplier: float) -> None:
        """Run the operations that end an output, and add it to the hidden state, after a norm if there is one."""
        hidden = self.hidden.shape[1]
        add = self._columns(Op.ADD, self._added, self.hidden, hidden, scale=multiplier)
        if norm is None:
            self._region([*rows, add])
            return
        self._region(rows)
        self._add_norm(norm, self._added, self._added, hidden)
        self._region([add])

    def _add_attention(self, own: Attention, given: Any, layer: int, turn: int) -> None:
        query_heads, kv_heads, dim = self.parts.shape.heads[layer]
        linears = [(own.query, self._query), (own.key, self._key), (own.value, self._value)]
        if own.gate is not None:
            linears.append(([own.gate], self._head_gate))
        rows = list[dict[Any, Any]]()
        for parts, out in linears:
            ends = np.cumsum([0, *(len(linear.weight) for linear in parts)]).tolist()
            for linear, first in zip(parts, ends, strict=False):
                rows.append(self._linear(linear, given, out, first=first, stride=ends[-1]))
        self._region(rows)
        inside = dict[Any, Any]()
        for norm, buffer, width, name in (
            (own.query_norm, self._query, query_heads * dim, Field.QUERY_NORM),
            (own.key_norm, self._key, kv_heads * dim, Field.KEY_NORM),
        ):
            if norm is None:
                continue
            if norm.weight is not None and norm.weight.shape[-1] == dim and norm.bias is None:  # of each head
                inside |= {name: self._floats(norm.weight), Field.KIND: norm.kind, Number.EPS: norm.eps}
                period = len(norm.weight) if norm.weight.dim() == 2 else 1
                inside[Field.PERIOD] = max(period, inside.get(Field.PERIOD, 1))  # of queries, which have more heads
            else:
                self._add_norm(norm, buffer, buffer, width, dim)
        if own.value_norm is not None:
            self._add_norm(own.value_norm, self._value, self._value, kv_heads * dim, dim)
        cos, sin = self.angles[self.parts.shape.kinds[layer]]
        self._region(
            [
                inside
                | {
                    Field.OP: Op.ATTEND,
                    Field.QUERY: self._query.ctypes.data,
                    Field.KEY: self._key.ctypes.data,
                    Field.VALUE: self._value.ctypes.data,
                    Field.OUTPUT: self._attended.ctypes.data,
                    Field.FIRST: self.first[layer],
                    Field.KV_HEADS: kv_heads,
                    Field.GROUP: query_heads // kv_heads,
                    Field.COLUMNS: dim,
                    Field.COS: cos.ctypes.data,
                    Field.SIN: sin.ctypes.data,
                    Field.PAIRS: cos.shape[1] if own.rotated else 0,
                    Field.INTERLEAVED: own.interleaved,
                    Field.LATE: own.late,
                    Field.SINKS: self._floats(own.sinks),
                    Field.TURN: turn,
                    Number.SCALE: own.scaling,
                    Number.CAP: own.softcap,
                }
            ]
        )
        width = query_heads * dim
        if own.inner is not None:
            self._add_norm(own.inner, self._attended, self._attended, width)
        if own.gate is not None:
            gate = self._columns(Op.GATE, self._head_gate, self._attended, width, kind=Activation.SIGMOID)
            self._region([gate])

    def _mlp(self, mlp: MLP, given: Any, out: Any) -> dict[Any, Any]:
        """Add all but the last operation of an MLP, which is returned."""
        inner, hidden = len(mlp.up.weight), self.hidden.shape[1]
        up = self._linear(mlp.up, given, self._up)
        if isinstance(mlp.activation, Xielu):
            own = mlp.activation
            numbers = {Number.SCALE: own.positive, Number.CAP: own.negative, Number.BETA: own.beta, Number.EPS: own.eps}
            self._region([up, self._columns(Op.XIELU, self._up, self._up, inner) | numbers])
        elif mlp.gate is None:
            self._region([up, self._columns(Op.ACTIVATE, self._up, self._up, inner, kind=mlp.activation)])
        else:
            gate = self._columns(Op.GATE, self._gate, self._up, inner, kind=mlp.activation)
            self._region([self._linear(mlp.gate, given, self._gate), up, gate])
        if mlp.inner is not None:
            self._add_norm(mlp.inner, self._up, self._up, inner)
        down = self._linear(mlp.down, self._up, out)
        if mlp.share is None:
            return down
        self._region([self._linear(mlp.share, given, self._share)])
        self._region([down])
        return self._columns(Op.GATE, self._share, out, hidden, 1, kind=Activation.SIGMOID)

    def _experts(self, own: Experts, given: Any, out: Any) -> dict[Any, Any]:
        """Add all but the last operation of a layer's experts, which is returned."""
        count, hidden, inner = len(own.gate_up), self.hidden.shape[1], _inner(own)
        self._region([self._linear(own.router, given, self._router)])
        places = {
            Field.CHOSEN: self._chosen.ctypes.data,
            Field.SHARES: self._shares.ctypes.data,
            Field.TOP_K: own.top_k,
        }
        route = self._columns(Op.ROUTE, self._router, self._router, count, kind=own.scores, scale=own.scale)
        self._region([route | places | {Field.BIAS: self._floats(own.bias), Field.LATE: own.normalised}])
        places_in, places_out = (places | {Field.WEIGHT: matrix.data_ptr()} for matrix in (own.gate_up, own.down))
        if (other := own.transposed) is not None:
            into = self._columns(Op.EXPERTS_IN_T, given, self._up, inner, hidden, scale=other.alpha)
            self._region([into | places_in | {Field.BIAS: self._floats(other.gate_up_bias), Number.CAP: other.limit}])
            back = self._columns(Op.EXPERTS_OUT_T, self._up, out, hidden, inner)
            return back | places_out | {Field.BIAS: self._floats(other.down_bias)}
        self._region(
            [self._columns(Op.EXPERTS_IN, given, self._up, inner, hidden, kind=own.activation or 0) | places_in]
        )
        return self._columns(Op.EXPERTS_OUT, self._up, out, hidden, inner) | places_out


def _inner(mlp: MLP | Experts) -> int:
    """The number of inner activations, of one expert."""
    if isinstance(mlp, Experts):
        return mlp.down.shape[1 if mlp.transposed else 2]
    return len(mlp.up.weight)

"""The plan: one pattern per KV head of a model, with its calibration settings and measured quality.

A plan is one readable JSON file. Loading checks every field and names an invalid one. Applying a plan checks that it was made
for the model.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    Field,
    ValidationError,
    model_validator,
)
from torch import nn

from headsink.errors import HeadsinkError
from headsink.eviction.pattern import FULL, LONGEST, Pattern
from headsink.eviction.scorers import SCORERS
from headsink.models.fingerprint import ALLOWED, Fingerprint, Hashed, Part
from headsink.models.spec import Architecture, check_plannable, describe, vocabulary
from headsink.plan.schema import Head, Positions, Quality, Tokens, unique
from headsink.plan.summary import as_html, as_text, contexts, summary
from headsink.utils.files import write_text
from headsink.utils.format import harmless

SCHEMA: Literal[5] = 5
DECODE_SHARE, MOST_DECODE_WINDOW = (
    4,
    512,
)  # the window while decoding is one in 4 of a head's keys on average, at most 512


class Plan(Part):
    """One pattern per KV head. `layers[l]` is None where the model has no full attention; headsink does not change such a layer.

    positions: "absolute", or "cache-relative", where positions count the cached keys (models/rope.py); texts may then have any
    length, and every head needs a window and no top-k keys. scorer: the name of the scorer of the heads' `scorer_weights`
    (eviction/scorers). reconstruction_prompt: token ids of the prompt of context reconstruction
    (compression/reconstruction.py), which asks the model to repeat the context. decode_window: window of every head while
    decoding, in tokens, if its own is smaller; the text that was just written is needed most.
    """

    schema_version: Literal[5] = SCHEMA
    headsink: str = Field(default_factory=lambda: version("headsink"))
    model: Fingerprint
    positions: Positions = "absolute"
    scorer: str = "linear"
    reconstruction_prompt: tuple[Tokens, ...] = ()
    decode_window: Annotated[int, Field(ge=0, le=LONGEST, strict=True)] = 0
    layers: tuple[tuple[Head, ...] | None, ...]
    calibration: dict[str, Any] = Field(default_factory=dict)
    quality: tuple[Quality, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if len(self.layers) != self.model.layers:
            raise ValueError(f"layers: {len(self.layers)} given, the model has {self.model.layers}")
        if self.scorer not in SCORERS:
            raise ValueError(f"scorer: {self.scorer!r} is unknown; one of {', '.join(SCORERS)}")
        for index, heads in enumerate(self.layers):
            for head, found in enumerate(heads or ()):
                if self.positions == "cache-relative" and (found.window is None or found.top_k):
                    what = "has full attention" if found.window is None else "has top-k keys"
                    raise ValueError(
                        f"positions: 'cache-relative' needs windows without top-k keys, but layers.{index}.{head} {what}"
                    )
            if heads is not None and len(heads) != self.model.kv_heads:
                raise ValueError(
                    f"layers.{index}: {len(heads)} heads given, the model has {self.model.kv_heads} KV heads"
                )
            for head, found in enumerate(heads or ()):
                if found.scorer_weights is not None and len(found.scorer_weights) != SCORERS[self.scorer].n_features(
                    self.model.head_dim
                ):
                    raise ValueError(
                        f"layers.{index}.{head}.scorer_weights: {len(found.scorer_weights)} weights given, heads of "
                        f"size {self.model.head_dim} need {SCORERS[self.scorer].n_features(self.model.head_dim)}"
                    )
        if self.positions == "cache-relative" and self.decode_window:
            raise ValueError(f"decode_window: {self.decode_window}, and with positions 'cache-relative' it must be 0")
        return self

    # making plans

    @classmethod
    def full(cls, model: nn.Module) -> Plan:
        """Return a plan of full attention, under which the model computes the same as without a plan."""
        return cls.uniform(model, FULL)

    @classmethod
    def uniform(cls, model: nn.Module, pattern: Pattern, **fields: Any) -> Plan:
        """Return a plan with the same pattern for every KV head, such as StreamingLLM's `Pattern(4, 0, window)`.

        For streaming generation add `positions="cache-relative"`. Raises HeadsinkError for a pattern with top-k keys: these need
        scorer weights, which `headsink.calibrate` fits.
        """
        if pattern.top_k:
            raise HeadsinkError("top_k: a uniform plan has no scorer weights; use headsink.calibrate")
        shape = describe(model)
        return cls.of(model, [[pattern] * shape.kv_heads if own else None for own in shape.planned], **fields)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        patterns: Sequence[Sequence[Pattern] | None],
        scores: torch.Tensor | None = None,
        **fields: Any,
    ) -> Plan:
        """Return a plan from patterns [layers][KV heads], None for a layer without full attention.

        scores: scorer weights [layers, KV heads, features], needed for heads with top-k keys.
        """
        check_plannable(describe(model))

        def weights(layer: int, head: int) -> tuple[float, ...] | None:
            return None if scores is None else tuple(float(f"{x:.6g}") for x in scores[layer, head].tolist())

        layers = [
            None
            if row is None
            else tuple(
                Head(
                    sink=p.sink,
                    top_k=p.top_k,
                    window=p.window,
                    scorer_weights=weights(layer, head) if p.top_k else None,
                )
                for head, p in enumerate(row)
            )
            for layer, row in enumerate(patterns)
        ]
        return cls(model=Fingerprint.of(model), layers=tuple(layers), **fields)

    # files

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the plan as JSON, atomically. force: also replace a file that headsink did not write."""
        return write_text(path, self.to_json(), force)

    def to_json(self) -> str:
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        return (
            re.sub(r"\{\n\s+(\"sink\"[^{}]*?)\n\s+\}", lambda m: "{" + re.sub(r"\n\s+", " ", m[1]) + "}", text) + "\n"
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan. Raises HeadsinkError with the name of the invalid field."""
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise HeadsinkError(f"cannot read plan {path}: {getattr(error, 'strerror', None) or error}") from error
        try:
            plan = cls.model_validate_json(text)
            json.loads(text, object_pairs_hook=unique)
        except ValidationError as error:
            old = next((e["input"] for e in error.errors() if e["loc"] == ("schema_version",)), None)
            if old in range(1, SCHEMA):
                command = f"headsink plan MODEL --budget BUDGET --context CONTEXT --out {path}"
                raise HeadsinkError(
                    f"{path}: a plan of schema {old}, and this headsink reads {SCHEMA}; make it again: {command}"
                ) from error
            first = error.errors()[0]
            field = ".".join(harmless(part) if isinstance(part, str) else str(part) for part in first["loc"]) or "plan"
            reason = first["msg"].removeprefix("Value error, ")
            raise HeadsinkError(f"{path}: not a valid plan: {field}: {reason}") from error
        except ValueError as error:
            raise HeadsinkError(f"{path}: not a valid plan: {error}") from error
        return plan

    # display

    def __repr__(self) -> str:
        return as_text(self)

    __str__ = __repr__

    def __rich_repr__(self) -> Iterator[tuple[str, str]]:
        yield from summary(self).items()

    def _repr_html_(self) -> str:
        return as_html(self)

    # use

    def with_decode_window(self) -> Plan:
        """Return this plan with the `decode_window` of its size: a quarter of the keys of a head on average, at most 512."""
        sizes = [head.pattern.size(LONGEST) for layer in self.layers for head in layer or () if head.window is not None]
        window = min(sum(sizes) // len(sizes) // DECODE_SHARE, MOST_DECODE_WINDOW) if sizes else 0
        return self.model_copy(update={"decode_window": window})

    def for_model(self, model: nn.Module) -> Plan:
        """Return this plan for other weights, such as a fine-tune of its model, with or without an adapter.

        The model must have the layers and heads of the plan's model. The copy has no measured quality; measure it with `headsink
        bench quality --plan FILE --other-weights`. Its calibration records the hash of the original weights. Raises HeadsinkError
        for a model of another shape.
        """
        shape = describe(model)
        self._check_numbers(shape)
        self._check_use(model, shape)
        if shape.name == self.model.architecture and self.model.other_weights(model) is None:
            return self
        origin = {"weights_of": self.model.weights} | self.calibration
        return self.model_copy(update={"model": Fingerprint.of(model), "quality": (), "calibration": origin})

    def scale(self, context: int) -> Plan:
        """Return this plan for another context: with the same KV budget there, shared by the heads in the same way.

        context: tokens of prompt and output together. The numbers of top-k keys change; in a plan without any, the windows.
        `quality` stays as measured at its own context.
        """
        if contexts(self) == [context]:
            return self
        base = contexts(self)[0]
        heads = [head for layer in self.layers for head in layer or () if head.window is not None]
        top_k = sum(head.top_k for head in heads)
        fixed = sum(head.sink + (head.window or 0) for head in heads)
        factor = max(0.0, ((fixed + top_k) * context / base - fixed) / top_k) if top_k else context / base

        def scaled(head: Head) -> Head:
            if head.window is None:
                return head
            if not top_k:
                return head.model_copy(update={"window": max(1, round((head.sink + head.window) * factor) - head.sink)})
            keys = int(head.top_k * factor)
            return head.model_copy(update={"top_k": keys, "scorer_weights": head.scorer_weights if keys else None})

        layers = tuple(heads if heads is None else tuple(map(scaled, heads)) for heads in self.layers)
        made = self.calibration | {"context": [context, context], "scaled_from": base}
        plan = self.model_copy(update={"layers": layers, "calibration": made})
        return plan.with_decode_window() if self.decode_window else plan

    def same_rules(self, other: Plan) -> bool:
        """Whether another plan evicts in the same way from the same model, however it was made."""
        apart = {"headsink", "calibration", "quality"}
        return self.model_dump(exclude=apart) == other.model_dump(exclude=apart)

    def check(self, model: nn.Module) -> Architecture:
        """Raise if the plan was made for another model. Return the model's architecture."""
        shape = describe(model)
        self.check_shape(shape)
        if other := self.model.other_weights(model):
            raise HeadsinkError(other)
        self._check_use(model, shape)
        return shape

    def _check_use(self, model: nn.Module, shape: Architecture) -> None:
        """Raise if the model does not support the plan's positions or reconstruction prompt."""
        if self.positions == "cache-relative":
            for index, heads in enumerate(self.layers):
                for number, head in enumerate(heads or ()):
                    if head.sink + (head.window or 0) > shape.max_context:
                        raise HeadsinkError(
                            f"layers.{index}.{number}: {head.sink} sink tokens and a window of {head.window} are more positions "
                            f"than the model has, {shape.max_context}"
                        )
        if (largest := max(self.reconstruction_prompt, default=0)) >= (known := vocabulary(model)):
            raise HeadsinkError(
                f"reconstruction_prompt: {largest} is no token of this model, which has 0 to {known - 1}"
            )

    def check_shape(self, shape: Architecture) -> None:
        """Raise if the plan was made for a model of another shape or class, or if plans do not support the model."""
        self._check_numbers(shape)
        if shape.name != self.model.architecture:
            raise HeadsinkError(
                f"the plan is for another model: architecture is {harmless(shape.name)} here and "
                f"{harmless(self.model.architecture)} in the plan; if these are the same layers under another name, {ALLOWED}"
            )

    def _check_numbers(self, shape: Architecture) -> None:
        check_plannable(shape)
        for field, found in Fingerprint.shapes(shape).items():
            planned = getattr(self.model, field)
            if planned != found and field != "architecture":
                raise HeadsinkError(f"the plan is for another model: {field} is {found} here and {planned} in the plan")
        for index, (heads, kind) in enumerate(zip(self.layers, shape.kinds, strict=True)):
            if (heads is None) != (kind != "full_attention"):
                what = (
                    "has full attention and needs patterns" if heads is None else f"is of kind {kind} and must be null"
                )
                raise HeadsinkError(f"layers.{index}: this layer of the model {what}")

    def check_weights(self, found: str, which: Hashed = "weights") -> None:
        """Raise if the plan was made for other weights. found: the model's hash of kind `which`."""
        if other := self.model.other_hash(found, which):
            raise HeadsinkError(other)

    def check_length(self, tokens: int, longest: int) -> None:
        """Raise if `tokens` is over the model's maximum `longest` and positions are absolute."""
        if self.positions == "absolute" and tokens > longest:
            raise HeadsinkError(
                f"a text has {tokens} tokens, over the model's maximum of {longest}; a plan of windows with positions "
                "'cache-relative' has no limit"
            )

    def scores(self, layer: int) -> torch.Tensor:
        """Return the scorer weights of a layer: float32 [KV heads, features], 0 for heads without top-k keys."""
        weights = torch.zeros(self.model.kv_heads, SCORERS[self.scorer].n_features(self.model.head_dim))
        for head, found in enumerate(self.layers[layer] or ()):
            if found.scorer_weights is not None:
                weights[head] = torch.tensor(found.scorer_weights)
        return weights

    @property
    def has_top_k(self) -> bool:
        """Whether any head has top-k keys."""
        return any(head.top_k for heads in self.layers for head in heads or ())

    @property
    def verified(self) -> int | None:
        """The longest context at which quality was measured, or None."""
        return max((quality.context for quality in self.quality), default=None)

    def warn_beyond_verified(self, tokens: int) -> bool:
        """Warn if a text of `tokens` tokens is longer than the longest measured context. Return whether it is."""
        beyond = self.verified is not None and tokens > self.verified
        if beyond:
            warnings.warn(
                f"a text has {tokens} tokens, the plan's quality was measured up to {self.verified}: beyond that it is unknown",
                stacklevel=2,
            )
        return beyond

    def kv_budget(self, context: int) -> float:
        """Return the KV budget: the fraction of the full KV entries that the plan's heads cache at `context` tokens."""
        heads = [head for layer in self.layers if layer for head in layer]
        return sum(head.pattern.size(context) for head in heads) / (context * len(heads)) if heads else 1.0

    def counts(self) -> dict[str, int]:
        """Return the number of KV heads with each pattern, most frequent first."""
        return dict(Counter(str(head.pattern) for layer in self.layers if layer for head in layer).most_common())

"""Compiled decode steps: one compiled call per token on a CPU (cpu.py), a CUDA graph on a GPU (cuda.py).

`refusal` gives the reason why a model is not supported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headsink.attention.backends import backend_of
from headsink.attention.formats import KVDtype
from headsink.cache.cache import PlanCache
from headsink.decoding.checks import CacheCheck
from headsink.errors import HeadsinkError
from headsink.models.distributed import input_device
from headsink.plan.plan import Plan
from headsink.utils import device


class Decoder(Protocol):
    """A compiled decode step for a model and a cache. Call `resume` after any other code has changed the cache.

    warns: warn where a text grows beyond the contexts that the plan's quality was measured at.
    """

    cache_check: CacheCheck
    warns: bool

    def run(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Append one token per sequence, int64 [sequences]. positions: by default they follow the cached tokens.

        Returns the logits of the next tokens, float32 [sequences, vocabulary].
        """

    def start_evicting(self) -> None:
        """Update the cache's lengths with the tokens that were appended."""

    def resume(self) -> None:
        """Continue after other code has changed the cache."""


def _backend(model: PreTrainedModel) -> Any:
    if input_device(model).type in device.DEVICES:
        from headsink.decoding import cuda

        return cuda
    from headsink.decoding import cpu

    return cpu


def refusal(model: PreTrainedModel, plan: Plan | None = None) -> str | None:
    """Why a model has no compiled decode step on this machine, or no plan of this kind; None if it has one."""
    kind = input_device(model).type
    backend = backend_of(kind)
    if plan is not None and plan.has_top_k and backend is not None and plan.scorer not in backend.scorers:
        return f"the plan's scorer {plan.scorer!r} has no kernel"
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != model.dtype:
        return "it does not support torch.autocast; convert the model with model.to(dtype) instead"
    reason: str | None = _backend(model).refusal(model)
    return reason


def prepare(model: PreTrainedModel, kv_dtype: KVDtype = "auto") -> None:
    """Compile the decode step of a model: about a minute the first time on a machine, then loaded from a cache."""
    _backend(model).prepare(model, kv_dtype)


def decoder(model: PreTrainedModel, cache: PlanCache) -> Decoder:
    """A decode step for a model and a filled cache. Raises HeadsinkError with the reason if there is none (`refusal`)."""
    if reason := refusal(model, cache.plan):
        raise HeadsinkError(f"decode: {reason}")
    step: Decoder = _backend(model).Decoder(model, cache)
    return step


@contextmanager
def open_decoder(model: PreTrainedModel, cache: PlanCache) -> Iterator[Decoder]:
    """Decode token by token into a cache inside the block. After the block the cache is up to date."""
    step = decoder(model, cache)
    try:
        yield step
    finally:
        step.start_evicting()

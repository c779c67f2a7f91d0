"""The open blocks of a model, `with apply(model, plan)`, and which of them a forward pass belongs to.

A block applies in every thread:

- If all open blocks of a model have the same plan, every pass runs under it.
- If they have several plans, a pass belongs to the block that called it: the block whose frame is on the call stack, also for a
  generator that other code resumes. If there is none, it belongs to the last block that the calling thread entered.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from transformers import Cache

from headsink.errors import HeadsinkError

Prepare = Callable[[dict[str, Any], bool], Cache]
Step = Callable[[], torch.Tensor]  # returns the logits of a pass


@dataclass(eq=False)
class Scope:
    """An open block.

    plan: None for the full cache. prepare: creates or checks the cache of a pass, given its arguments. private: the block is
    headsink's own, and applies only to calls from it. step: finds the compiled decode step that can take the place of a pass of
    the model, given its arguments and its cache.
    """

    plan: Any
    prepare: Prepare | None
    private: bool = False
    step: Callable[[dict[str, Any], Any], Step | None] | None = None
    thread: int = field(default_factory=threading.get_ident)
    frame: tuple[int, Any] = field(default_factory=lambda: _caller())


def _caller() -> tuple[int, Any]:
    """Return the frame that enters a block: the first outside the modules that open blocks and `contextlib`."""
    frame: FrameType | None = sys._getframe(1)
    skipped = (__name__, "headsink.attention.passes", "headsink.runtime.apply", "contextlib", "dataclasses")
    while frame is not None and (frame.f_globals.get("__name__") in skipped or frame.f_code.co_filename == "<string>"):
        frame = frame.f_back
    return (0, None) if frame is None else (id(frame), frame.f_code)


def scope_of(scopes: Sequence[Scope]) -> Scope | None:
    """Return the block of a pass that begins now in the calling thread, or None. scopes: of the model, in the order of entry."""
    public = [scope for scope in scopes if not scope.private]
    if len(public) == len(scopes) and all(
        scope.plan is scopes[0].plan or scope.plan == scopes[0].plan for scope in scopes
    ):
        return scopes[-1] if scopes else None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for scope in reversed(scopes):
            if scope.frame == (id(frame), frame.f_code):
                return scope
        frame = frame.f_back
    own = [scope for scope in scopes if scope.thread == threading.get_ident()]
    if own:
        return own[-1]
    if any(scope.plan != public[0].plan for scope in public):
        raise HeadsinkError(
            "several plans are applied to this model by other threads: enter `with headsink.apply(model, plan):` in this one too"
        )
    return public[-1] if public else None

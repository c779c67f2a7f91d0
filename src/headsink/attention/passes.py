"""Which plan a forward pass runs under, and whether every layer did.

A model is *engaged* while headsink has to do with it: its attention goes to the function that attention.py registers with
transformers, and hooks see every forward pass. An open `with apply(model, plan)` block is a `Scope` of the model. It holds
in every thread:

- While the open blocks of a model have one plan, every pass runs under it.
- If they have several, the block counts that the call comes from (its frame is on the call stack, which is so for a generator
  too, whoever resumes it), else the last one that the calling thread entered.

A pass that begins in a block is finished under its plan, even if the block is left by another thread meanwhile. After a pass
each layer that the plan governs must have attended through the plan's cache.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from headsink.errors import HeadsinkError
from headsink.models.spec import unwrapped
from headsink.models.transformers_names import given_cache, named_arguments, with_cache, without_cache

ATTENTION = "headsink"  # the name under which attention.py registers with transformers

Prepare = Callable[[dict[str, Any], bool], Cache]


@dataclass(eq=False)
class Scope:
    """An open block. plan: None if the model runs with the full cache in it. prepare: makes or checks the cache of a pass,
    given its
    arguments. private: the block is headsink's own, and holds for calls from it only."""

    plan: Any
    prepare: Prepare | None
    private: bool = False
    thread: int = field(default_factory=threading.get_ident)
    frame: tuple[int, Any] = field(default_factory=lambda: _caller())


@dataclass(eq=False)
class Pass:
    """A forward pass under a plan. module: the outermost one that was called; attended: how often each layer of the cache
    did before."""

    state: _State
    scope: Scope
    module: nn.Module
    cache: Cache
    keeps: bool  # whether the caller wants the cache back
    attended: list[tuple[int, Any, int]]


class _State:
    """What headsink keeps of an engaged model."""

    def __init__(self, model: PreTrainedModel):
        self.config, self.before = model.config, str(model.config._attn_implementation)
        self.text_config = model.config.get_text_config(
            decoder=True
        )  # finding it takes long, for every layer of every token
        self.users = 0
        self.scopes: list[Scope] = []
        inner = model.get_decoder()
        names = [name for name, module in model.named_modules() if module is inner][:1] or [""]
        parts = names[0].split(".") if names[0] else []
        path = {id(m): m for n in range(len(parts) + 1) for m in [model.get_submodule(".".join(parts[:n]))]}
        self.hooks = [
            handle
            for module in path.values()
            for handle in (
                module.register_forward_pre_hook(_Hook(_begin, self), with_kwargs=True),
                module.register_forward_hook(_Hook(_end, self), with_kwargs=True, always_call=True),
            )
        ]
        self.layers = [module for module in inner.modules() if isinstance(getattr(module, "layer_idx", None), int)]
        for module in self.layers:
            _owners[module] = self


class _Hook:
    """A hook of an engaged model. A copy of the model must not have it, nor the attention that goes with it."""

    def __init__(self, work: Callable[..., Any], state: _State):
        self.work, self.state = work, state

    @torch.compiler.disable
    def __call__(self, *args: Any) -> Any:
        return self.work(self.state, *args)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise HeadsinkError(
            "a model cannot be copied or pickled inside `with headsink.apply(...)`: do it outside the block"
        )


class _Local(threading.local):
    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.watchers = 0  # `watching` blocks


_states: weakref.WeakKeyDictionary[PreTrainedModel, _State] = weakref.WeakKeyDictionary()
_owners: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()  # of modules with a layer's number
_lock = threading.RLock()
_here = _Local()


def _after_fork() -> None:
    """In a forked process nobody else holds the lock."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def _use(model: nn.Module) -> _State:
    inside = unwrapped(model)
    with _lock:
        state = _states.get(inside)
        if state is None:
            state = _states[inside] = _State(inside)
            inside.set_attn_implementation(ATTENTION)
        state.users += 1
        return state


def _release(state: _State) -> None:
    with _lock:
        state.users -= 1
        if state.users:
            return
        for hook in state.hooks:
            hook.remove()
        for module in state.layers:
            _owners.pop(module, None)
        model = next((model for model, found in _states.items() if found is state), None)
        if model is not None:
            del _states[model]
            model.set_attn_implementation(state.before)


@contextmanager
def engaged(model: PreTrainedModel) -> Iterator[None]:
    """Route the model's attention through headsink until the last such block, and the last pass that began in one, ends."""
    state = _use(model)
    try:
        yield
    finally:
        _release(state)


@contextmanager
def scoped(model: PreTrainedModel, plan: Any, prepare: Prepare | None, private: bool = False) -> Iterator[None]:
    """Run the model's passes under a plan (`Scope`) until the block ends."""
    scope, state = Scope(plan, prepare, private), _use(model)
    with _lock:
        state.scopes.append(scope)
    try:
        yield
    finally:
        with _lock:
            state.scopes.remove(scope)
        # An interrupted pass has left its mark: torch runs no hook after ctrl-C.
        for one in [p for p in _here.passes if p.scope is scope]:
            _drop(one)
        _release(state)


@contextmanager
def watching() -> Iterator[None]:
    """Passes of this thread are looked at (attention.py), and run under no plan."""
    _here.watchers += 1
    try:
        yield
    finally:
        _here.watchers -= 1


def _caller() -> tuple[int, Any]:
    """The frame that enters a block: the first outside this module, `contextlib` and the function that has the block."""
    frame: FrameType | None = sys._getframe(1)
    skipped = (__name__, "contextlib", "dataclasses", "headsink.runtime.apply")
    while frame is not None and (frame.f_globals.get("__name__") in skipped or frame.f_code.co_filename == "<string>"):
        frame = frame.f_back
    return (0, None) if frame is None else (id(frame), frame.f_code)


def _scope(state: _State) -> Scope | None:
    """The block that a pass of the calling thread belongs to, None for none."""
    scopes = list(state.scopes)
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


def check_pass(layer: Any) -> None:
    """Raise unless a pass of this thread is under way with the cache that a layer belongs to."""
    here = _here.passes[-1] if _here.passes else None
    if here is None or layer not in here.cache.layers:
        raise HeadsinkError(
            "this cache carries a plan: run the model inside `with headsink.apply(model, plan):`, and leave the block only when "
            "all threads that use the model are done"
        )


def check_uncached(module: nn.Module) -> None:
    """Raise if a layer that a plan governs attends to keys that are not in the plan's cache."""
    state = _owners.get(module)
    if state is None or _here.watchers:
        return
    scope = _here.passes[-1].scope if _here.passes else _scope(state)
    if scope is not None and scope.plan is not None and scope.plan.layers[module.layer_idx] is not None:
        raise HeadsinkError(
            f"layer {module.layer_idx}: it attended without the plan's cache, so the plan does not hold. Call the "
            "model itself, not its parts or `forward`, and leave gradient checkpointing off"
        )


def _begin(state: _State, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a module on the way to the decoder runs: the outermost one gets the plan's cache."""
    if _here.watchers:
        return None
    for stale in [p for p in _here.passes if p.module is module]:
        _drop(stale)
    here = _here.passes[-1] if _here.passes else None
    given = named_arguments(module, args, kwargs)
    if here is not None and here.state is state:
        if given_cache(given) is not here.cache:
            raise HeadsinkError(
                f"{type(module).__name__} was called with another KV cache than the plan's: "
                f"{type(here.module).__name__} makes one of its own, which no plan can govern"
            )
        return None
    scope = _scope(state)
    if given.get("output_attentions") or (
        given.get("output_attentions") is None and getattr(state.config, "output_attentions", False)
    ):
        raise HeadsinkError(
            "output_attentions: the weights are never computed while headsink runs the model; leave it out, or look "
            "at heads with headsink.analyze"
        )
    if scope is None or scope.prepare is None:
        return None
    if (found := _attention_of(state)) != ATTENTION:
        raise HeadsinkError(_changed(found))
    wanted = given.get("use_cache")
    wanted = getattr(state.text_config, "use_cache", True) if wanted is None else wanted
    keeps = bool(wanted) or given_cache(given) is not None
    cache = scope.prepare(given, keeps)
    layers = [(n, layer, layer.attended) for n, layer in enumerate(cache.layers) if hasattr(layer, "attended")]
    with _lock:
        state.users += 1
    _here.passes.append(Pass(state, scope, module, cache, keeps, layers))
    return (), with_cache(module, given, cache)


def _end(state: _State, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After a module has run: of the outermost one, see that the plan held. output: None after an error."""
    here = _here.passes[-1] if _here.passes else None
    if here is None or here.module is not module:
        return None
    _drop(here)
    if output is None:
        return None
    missed = [number for number, layer, before in here.attended if layer.attended == before]
    if missed:
        raise HeadsinkError(
            f"layer {missed[0]}: it did not attend through the plan, so the plan does not hold: {_cause(here, missed)}"
        )
    return None if here.keeps else without_cache(output)


def _drop(one: Pass) -> None:
    _here.passes.remove(one)
    _release(one.state)


def _attention_of(state: _State) -> str:
    return str(state.text_config._attn_implementation)


def _changed(found: str) -> str:
    return f"the model's attention was set to {found!r} inside `with headsink.apply(model, plan):`; set it before the block"


def _cause(one: Pass, missed: list[int]) -> str:
    """The likely reason why layers did not attend through the plan."""
    if (found := _attention_of(one.state)) != ATTENTION:
        return _changed(found)
    if len(missed) < len(one.attended):
        return (
            "its attention was replaced, and only attention that goes through transformers' AttentionInterface and "
            "Cache.update can follow a plan"
        )
    return (
        "no layer got the plan's cache. The model was patched or compiled, or this version of transformers hands caches on "
        "in another way (run `headsink doctor`)"
    )

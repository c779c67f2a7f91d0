"""Run each forward pass under the plan of the block that it belongs to, and check that every layer applied it.

While a model is *engaged*, its attention goes to the function that attention/interface.py registers with transformers, and hooks
run around every forward pass. An open `with apply(model, plan)` block is a `Scope` of the model (scopes.py says which passes
belong to it). A pass that begins in a block ends under its plan, even if another thread leaves the block meanwhile. After a pass,
every layer with patterns in the plan must have attended through the plan's cache.

A block may have a compiled decode step (decoding/token.py). While a model is engaged its `forward` is wrapped, so that the step
can take the place of a pass of one token.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from headsink.attention.scopes import Prepare, Scope, Step, scope_of
from headsink.errors import HeadsinkError
from headsink.models.spec import decoder, unwrap
from headsink.models.transformers_names import cache_argument, given_cache, named_arguments, with_cache, without_cache

ATTENTION = "headsink"  # the name that attention/interface.py registers with transformers

CAPTURES = "transformers.utils.output_capturing"


@dataclass(eq=False)
class Pass:
    """A forward pass under a plan.

    module: the outermost called module. attended: for each cache layer, the number of `attend` calls before the pass. step: what
    runs instead of the model, None for the model.
    """

    state: _State
    scope: Scope
    module: nn.Module
    cache: Cache
    keeps: bool  # whether the output includes the cache
    attended: list[tuple[int, Any, int]]
    step: Step | None


class _State:
    """The hooks, scopes and users of an engaged model."""

    def __init__(self, model: PreTrainedModel):
        self.config, self.before = model.config, str(model.config._attn_implementation)
        self.text_config = model.config.get_text_config(decoder=True)  # cached, since the lookup is slow
        self.users = 0
        self.scopes: list[Scope] = []
        self.output: Any = None  # class of the model's outputs, once there was one
        self.forward = model.__dict__.get("forward"), _with_steps(model.forward, self)
        model.forward = self.forward[1]
        inner = decoder(model)
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

    def restore(self, model: PreTrainedModel) -> None:
        """Undo the changes of the model."""
        model.set_attn_implementation(self.before)
        before, ours = self.forward
        if model.__dict__.get("forward") is not ours:
            return  # other code has wrapped ours, which does nothing from now on
        if before is None:
            del model.forward
        else:
            model.forward = before


class _Hook:
    """A hook of an engaged model. It prevents copying the model, whose copy would have the hooks."""

    def __init__(self, work: Callable[..., Any], state: _State):
        self.work, self.state = work, state

    @torch.compiler.disable
    def __call__(self, *args: Any) -> Any:
        return self.work(self.state, *args)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise HeadsinkError(
            "a model cannot be copied or pickled inside `with headsink.apply(...)`: do it outside the block"
        )


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.watchers = 0  # `watch` blocks


_states: weakref.WeakKeyDictionary[PreTrainedModel, _State] = weakref.WeakKeyDictionary()
_owners: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()  # of modules with a layer_idx
_lock = threading.RLock()
_thread = _ThreadState()


def _after_fork() -> None:
    """Replace the lock in a forked process, where its owner may not exist."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def _use(model: nn.Module) -> _State:
    inside = unwrap(model)
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
            state.restore(model)


@contextmanager
def engage(model: PreTrainedModel) -> Iterator[None]:
    """Route the model's attention through headsink until the last such block, and the last pass begun in one, ends."""
    state = _use(model)
    try:
        yield
    finally:
        _release(state)


@contextmanager
def enter_scope(
    model: PreTrainedModel,
    plan: Any,
    prepare: Prepare | None,
    private: bool = False,
    step: Callable[[dict[str, Any], Any], Step | None] | None = None,
) -> Iterator[None]:
    """Run the model's passes under a plan (`Scope`) in the block."""
    scope, state = Scope(plan, prepare, private, step), _use(model)
    with _lock:
        state.scopes.append(scope)
    try:
        yield
    finally:
        with _lock:
            state.scopes.remove(scope)
        # An interrupted pass is still registered: torch runs no hook after ctrl-C.
        for one in [p for p in _thread.passes if p.scope is scope]:
            _drop(one)
        _release(state)


@contextmanager
def watch() -> Iterator[None]:
    """In the block, passes of this thread are observed (attention/interface.py) and run without a plan."""
    _thread.watchers += 1
    try:
        yield
    finally:
        _thread.watchers -= 1


def check_pass(layer: Any) -> None:
    """Raise unless this thread runs a pass with the cache that contains `layer`."""
    current = _thread.passes[-1] if _thread.passes else None
    if current is None or layer not in current.cache.layers:
        raise HeadsinkError(
            "this cache carries a plan: run the model inside `with headsink.apply(model, plan):`, and leave the block only when "
            "all threads that use the model are done"
        )


def check_uncached(module: nn.Module) -> None:
    """Raise if a layer with patterns in the plan attends to keys outside the plan's cache."""
    state = _owners.get(module)
    if state is None or _thread.watchers:
        return
    scope = _thread.passes[-1].scope if _thread.passes else scope_of(list(state.scopes))
    if scope is not None and scope.plan is not None and scope.plan.layers[module.layer_idx] is not None:
        raise HeadsinkError(
            f"layer {module.layer_idx}: it attended without the plan's cache, so the plan was not applied. Call the "
            "model, not its parts or `forward`, and turn gradient checkpointing off"
        )


def _begin(state: _State, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-forward hook of the modules from the model to the decoder. The outermost one gets the plan's cache."""
    if _thread.watchers:
        return None
    for stale in [p for p in _thread.passes if p.module is module]:
        _drop(stale)
    current = _thread.passes[-1] if _thread.passes else None
    given = named_arguments(module, args, kwargs)
    if current is not None and current.state is state:
        if given_cache(given) is not current.cache:
            raise HeadsinkError(
                f"{type(module).__name__} was called with another KV cache than the plan's: "
                f"{type(current.module).__name__} makes its own cache, which a plan cannot use"
            )
        return None
    scope = scope_of(list(state.scopes))
    if given.get("output_attentions") or (
        given.get("output_attentions") is None and getattr(state.config, "output_attentions", False)
    ):
        raise HeadsinkError(
            "output_attentions: the weights are never computed while headsink runs the model; leave it out, or measure "
            "heads with headsink.analyze"
        )
    if scope is None or scope.prepare is None:
        return None
    if (found := _attention_of(state)) != ATTENTION:
        raise HeadsinkError(_implementation_error(found))
    use_cache = given.get("use_cache")
    use_cache = getattr(state.text_config, "use_cache", True) if use_cache is None else use_cache
    keeps = bool(use_cache) or given_cache(given) is not None
    cache = scope.prepare(given, keeps)
    whole = state.output is not None and _states.get(module) is state  # type: ignore[call-overload]
    step = scope.step(given, cache) if scope.step is not None and whole else None
    layers = [(n, layer, layer.attended) for n, layer in enumerate(cache.layers) if hasattr(layer, "attended")]
    with _lock:
        state.users += 1
    _thread.passes.append(Pass(state, scope, module, cache, keeps, layers, step))
    return (), with_cache(module, given, cache)


def _end(state: _State, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook. After the outermost module, check that all layers applied the plan. output: None after an error."""
    current = _thread.passes[-1] if _thread.passes else None
    if current is None or current.module is not module:
        return None
    _drop(current)
    if output is None:
        return None
    if isinstance(output, ModelOutput) and "logits" in output and _states.get(module) is state:  # type: ignore[call-overload]
        state.output = type(output)
    missed = [number for number, layer, before in current.attended if layer.attended == before]
    if missed:
        raise HeadsinkError(
            f"layer {missed[0]}: it did not attend through the plan's cache, so the plan was not applied: "
            f"{_cause(current, missed)}"
        )
    return None if current.keeps else without_cache(output)


def _with_steps(forward: Callable[..., Any], state: _State) -> Callable[..., Any]:
    """Return the `forward` of an engaged model, which lets the step of a pass take its place."""

    @wraps(forward)
    @torch.compiler.disable(recursive=False)  # torch.compile sees the model's own `forward` only
    def call(*args: Any, **kwargs: Any) -> Any:
        current = _thread.passes[-1] if _thread.passes else None
        if current is None or current.state is not state or current.step is None:
            return forward(*args, **kwargs)
        step, current.step = current.step, None
        outer, _thread.passes = _thread.passes, []  # the step may run the model, in passes of its own
        try:
            logits = step()
        finally:
            _thread.passes = outer
        return state.output(logits=logits[:, None], **cache_argument(current.cache))

    return call


def changed(model: PreTrainedModel, parts: Iterable[nn.Module]) -> bool:
    """Whether other code has changed what an engaged model or one of its parts does (`extended`)."""
    everywhere = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    if _states[model].forward[0] is not None or any(everywhere):
        return True
    for part in parts:  # hundreds, for every token
        own = part.__dict__
        if "forward" in own or ((own["_forward_hooks"] or own["_forward_pre_hooks"]) and extended(part)):
            return True
    return False


def extended(part: nn.Module) -> bool:
    """Whether other code has put hooks on a part of a model, or has replaced its `forward`.

    Not counted: headsink's hooks, and those that transformers leaves on layers once it was asked for hidden states. They do
    nothing unless it is asked again.
    """
    if "forward" in part.__dict__:
        return True
    hooks = (hook for own in (part._forward_hooks, part._forward_pre_hooks) if own for hook in own.values())
    return any(not isinstance(hook, _Hook) and getattr(hook, "__module__", "") != CAPTURES for hook in hooks)


def _drop(one: Pass) -> None:
    _thread.passes.remove(one)
    _release(one.state)


def _attention_of(state: _State) -> str:
    return str(state.text_config._attn_implementation)


def _implementation_error(found: str) -> str:
    return f"the model's attention was set to {found!r} inside `with headsink.apply(model, plan):`; set it before the block"


def _cause(one: Pass, missed: list[int]) -> str:
    """Return the likely reason why layers did not apply the plan."""
    if (found := _attention_of(one.state)) != ATTENTION:
        return _implementation_error(found)
    if len(missed) < len(one.attended):
        return (
            "its attention was replaced; a plan needs attention that goes through transformers' AttentionInterface and "
            "Cache.update"
        )
    return (
        "no layer got the plan's cache. The model was patched or compiled, or this version of transformers passes caches "
        "differently (run `headsink doctor`)"
    )

"""The presses of NVIDIA's kvpress on the cases that plans are judged on, at the same KV bytes.

make peers   (a virtual environment of its own, since kvpress needs an older transformers; then this, on all cases)

A press sees the context only. It compresses the cache before any continuation is known; every continuation is then scored by
itself over what the press held. The result has one record per case, press, budget and continuation, and the bytes held.

What makes it fast and what makes it fair:

- Presses compress a layer after its attention has run, so what they see does not depend on them. The context is read once,
  and every press is replayed on what was seen. A self-check at the start compares this with the ordinary use of each press.
- A compressed cache is shorter than the text. Every layer gets a mask of its own (all that is kept, causal among the
  continuation), and tokens get their true positions.
- Some presses do not remove keys but mark them per head, to be replaced in later attention by fake keys, searched for so that
  no query gives them weight. Here marked keys are masked, per head, which gives the same figures without a search that can
  fail; and their bytes count as freed, although the library goes on holding them.
- Layers with a sliding window of their own are left alone and not counted.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any
from unittest import mock

import kvpress
import pandas
import torch
from kvpress.presses import duo_attention_press
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
logging.getLogger("kvpress").setLevel(logging.ERROR)  # presses warn at every start

CHECK_TOKENS, CHECK_BUDGET = 500, 0.8  # of the self-check: DuoAttention holds 384 tokens at least, LagKV needs 260
PIECE = 2000  # characters of a text that DuoAttention's heads are scored on
PLACEHOLDER = torch.ones(1, 1, 1, 1, dtype=torch.bool)  # 4-D, so that the model makes no mask of its own


class KVzip(kvpress.KVzipPress):
    """KVzip that reads the context again once, and chooses for each of `budgets` from the same scores."""

    def choose(self, model: PreTrainedModel, ids: Tensor, budgets: list[float]) -> dict[float, Held]:
        """Read a context, ids [1, tokens], in KVzip's ordinary way; what it holds at each budget."""
        self.budgets, self.found = budgets, {}
        self.compression_ratio = 1 - min(budgets)  # at 0 it does nothing
        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
        tokenizer.chat_template = None  # with one, the press takes the first tokens of a context for the template's
        with mock.patch.object(AutoTokenizer, "from_pretrained", return_value=tokenizer), self(model):
            model.model(input_ids=ids, past_key_values=DynamicCache(config=model.config))
        return self.found

    def compress_post(self, model: PreTrainedModel) -> None:
        """What KVzip does at its end, once for each budget."""
        for budget in self.budgets:
            self.compression_ratio = 1 - budget
            super().compress_post(model)
            self.found[budget] = take(model, self._cache)


# Settings are those of kvpress's own evaluation registry, or the defaults, which its documentation recommends.
PRESSES: dict[str, Callable[[], kvpress.BasePress]] = {
    "StreamingLLM": kvpress.StreamingLLMPress,
    "SnapKV": kvpress.SnapKVPress,
    "TOVA": kvpress.TOVAPress,
    "ExpectedAttention": kvpress.ExpectedAttentionPress,
    "AdaKV+ExpectedAttention": lambda: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress()),
    "AdaKV+ExpectedAttention-e2": lambda: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(epsilon=1e-2)),
    "AdaKV+SnapKV": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress()),
    "CriticalAdaKV+ExpectedAttention": lambda: kvpress.CriticalAdaKVPress(
        kvpress.ExpectedAttentionPress(use_vnorm=False)
    ),
    "CriticalAdaKV+SnapKV": lambda: kvpress.CriticalAdaKVPress(kvpress.SnapKVPress()),
    "PyramidKV": kvpress.PyramidKVPress,
    "KeyDiff": kvpress.KeyDiffPress,
    "LagKV": kvpress.LagKVPress,
    "Knorm": kvpress.KnormPress,
    "Compactor": kvpress.CompactorPress,
    "DuoAttention": lambda: kvpress.DuoAttentionPress(on_the_fly_scoring=True),
    "KVzip": KVzip,
}
NOTES = {
    "PyramidKV": "; by its own rule it is SnapKV where its last layer would get fewer than window_size keys",
    "Compactor": "; its random sketches are seeded",
    "DuoAttention": "; heads scored on the calibration half of Python's language reference instead of BookSum; "
    "head_compression_ratio as low as the budget allows",
    "KVzip": "; the contexts are plain text, so without the chat template",
}


@dataclass
class Reading:
    """A context as the model read it: ids [1, tokens], the whole cache, and what each layer to compress was called with."""

    ids: Tensor
    cache: DynamicCache
    calls: dict[int, dict[str, Any]]  # layer to keyword arguments of its attention


@dataclass
class Held:
    """What is held of a context; `marked` keys only count as removed: layer to [KV heads, keys], True where removed."""

    cache: DynamicCache
    marked: dict[int, Tensor]

    def nbytes(self, model: PreTrainedModel) -> int:
        """Bytes of the keys and values that are not marked, in the layers without a sliding window."""
        total = 0
        for index in (module.layer_idx for module in compressible(model)):
            layer, marked = self.cache.layers[index], self.marked[index]
            total += (layer.keys.nbytes + layer.values.nbytes) * int((~marked).sum()) // marked.numel()
        return total


def attention(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of every layer."""
    return [layer.self_attn for layer in model.model.layers]


def slides(module: nn.Module) -> bool:
    """Whether an attention module has a sliding window of its own."""
    return getattr(module, "is_sliding", False)


def compressible(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules without a sliding window."""
    return [module for module in attention(model) if not slides(module)]


def load(folder: str, dtype: str) -> PreTrainedModel:
    """The model, with rotary embeddings where presses look for them."""
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    rotary = model.model.rotary_emb
    if any(map(slides, attention(model))):  # Gemma 3 has embeddings of two kinds, and presses do not say which
        forward = rotary.forward
        rotary.forward = lambda x, position_ids, layer_type="full_attention": forward(x, position_ids, layer_type)
    for module in attention(model):
        module.rotary_emb = rotary
    return model


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that starts as `cache` is and leaves it alone: layers put new tensors in place of old ones."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked


def read(model: PreTrainedModel, ids: Tensor) -> Reading:
    """Run the model over a context, ids [1, tokens], with nothing compressed."""
    calls: dict[int, dict[str, Any]] = {}

    def note(module: nn.Module, _: Any, kwargs: dict[str, Any], __: Any) -> None:
        calls[module.layer_idx] = kwargs

    cache = DynamicCache(config=model.config)
    with ExitStack() as hooks:
        for module in compressible(model):
            hooks.enter_context(module.register_forward_hook(note, with_kwargs=True))
        model.model(input_ids=ids, past_key_values=cache)
    return Reading(ids, cache, calls)


def take(model: PreTrainedModel, cache: DynamicCache) -> Held:
    """What is in `cache` now, less the keys that a press has marked on the attention modules; takes the marks off."""
    marked = {}
    for module in attention(model):
        marked[module.layer_idx] = torch.zeros(cache.layers[module.layer_idx].keys.shape[1:3], dtype=torch.bool)
        indices = getattr(module, "masked_key_indices", None)  # (batch, head, key)
        if indices is not None:
            marked[module.layer_idx][indices[1:]] = True
        module.masked_key_indices = None
    return Held(fork(cache), marked)


def seed(module: nn.Module, _: Any = None) -> None:
    """Compactor draws a random sketch for every layer: always the same for a layer."""
    torch.manual_seed(module.layer_idx)


def set_budget(model: PreTrainedModel, press: kvpress.BasePress, budget: float, tokens: int) -> None:
    """Make a press keep `budget` of the KV entries of `tokens` tokens. Raises ValueError if it cannot."""
    press.post_init_from_model(model)
    if not isinstance(press, kvpress.DuoAttentionPress):
        press.compression_ratio = 1 - budget
        return
    held = press.sink_size + press.recent_size
    if held > budget * tokens:
        raise ValueError(f"a streaming head holds {held} tokens, which is over the budget by itself")
    heads = press.streaming_mask.numel()
    press.head_compression_ratio = math.ceil(heads * (1 - budget) / (1 - held / tokens)) / heads
    press.post_init_from_model(model)


def compressor(model: PreTrainedModel, name: str, reading: Reading, budgets: list[float]) -> Callable[[float], Held]:
    """What gives, for a budget, what the press would hold of the context. Both raise ValueError where the press refuses."""
    press = PRESSES[name]()
    if isinstance(press, KVzip):
        return press.choose(model, reading.ids, budgets).__getitem__
    if isinstance(press, kvpress.DuoAttentionPress) and any(map(slides, attention(model))):
        raise ValueError("it ranks the heads of all layers together, those with a sliding window too")

    def compress(budget: float) -> Held:
        set_budget(model, press, budget, reading.ids.shape[1])
        cache = fork(reading.cache)
        for module in compressible(model):
            seed(module)
            press.forward_hook(module, [], reading.calls[module.layer_idx] | {"past_key_values": cache}, [None, None])
        return take(model, cache)

    return compress


def score(model: PreTrainedModel, held: Held, start: int, continuation: dict[str, Any]) -> tuple[float, bool]:
    """Mean nll of the scored tokens of a continuation that starts at position `start`; whether each is the likeliest."""

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Let new tokens see what is held less what is marked, and each other causally, within the layer's window."""
        marked, new = held.marked[module.layer_idx], kwargs["hidden_states"].shape[1]
        keys = marked.shape[1]
        mask = torch.ones(1, new, keys + new, dtype=torch.bool).tril(keys)  # [1 or heads, new, keys + new]
        if slides(module):
            mask = mask.triu(keys - module.sliding_window + 1)
        if marked.any():
            hidden = marked.repeat_interleave(module.num_key_value_groups, 0)[:, None]
            mask = mask & ~nn.functional.pad(hidden, (0, new))
        return args, kwargs | {"attention_mask": mask[None]}

    ids, scored = torch.tensor([continuation["ids"]]), continuation["scored"]
    with ExitStack() as hooks:
        for module in attention(model):
            hooks.enter_context(module.register_forward_pre_hook(see, with_kwargs=True))
        output = model(
            ids,
            past_key_values=fork(held.cache),
            position_ids=torch.arange(start, start + ids.shape[1])[None],
            attention_mask=PLACEHOLDER,
            logits_to_keep=scored + 1,
        )
    logits, targets = output.logits[0, :-1].float(), ids[0, -scored:]  # [scored, vocabulary], [scored]
    return nn.functional.cross_entropy(logits, targets).item(), bool((logits.argmax(-1) == targets).all())


def duo_texts(*_: Any, **__: Any) -> SimpleNamespace:
    """Stands in for the data set BookSum, which would be a download."""
    names = [
        name for name in sorted(topics) if hashlib.sha256(name.encode()).digest()[0] < 128
    ]  # as headsink.data.corpus
    pieces = [topics[name][at : at + PIECE] for name in names for at in range(0, len(topics[name]) - PIECE, PIECE)]
    return SimpleNamespace(to_pandas=lambda: pandas.DataFrame({"chapter": pieces}))


def check(model: PreTrainedModel, names: list[str]) -> None:
    """Exit if a replayed press holds other things than the press in ordinary use, or if masks and positions are wrong."""
    ids = torch.randint(model.config.vocab_size, (1, CHECK_TOKENS + 50), generator=torch.Generator().manual_seed(0))
    reading = read(model, ids[:, :CHECK_TOKENS])
    found, _ = score(model, take(model, reading.cache), CHECK_TOKENS, {"ids": ids[0, -50:].tolist(), "scored": 49})
    logits = model(ids, logits_to_keep=50).logits[0, :-1].float()
    expected = nn.functional.cross_entropy(logits, ids[0, -49:]).item()
    if abs(found - expected) > (1e-4 if model.dtype == torch.float32 else 0.05):
        sys.exit(f"self-check: nll {found} in two passes, {expected} in one")
    for name in names:
        if PRESSES[name] is KVzip:  # is not replayed
            continue
        try:
            replayed = compressor(model, name, reading, [])(CHECK_BUDGET)
        except ValueError:  # refused, as run_case will record
            continue
        press, cache = PRESSES[name](), DynamicCache(config=model.config)
        set_budget(model, press, CHECK_BUDGET, CHECK_TOKENS)
        with ExitStack() as hooks:
            for module in attention(model):
                hooks.enter_context(module.register_forward_pre_hook(seed))
            hooks.enter_context(press(model))
            model.model(input_ids=reading.ids, past_key_values=cache)
        ordinary = take(model, cache)
        for index in reading.calls:
            ours, theirs = replayed.cache.layers[index], ordinary.cache.layers[index]
            same = torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
            if not same or not torch.equal(replayed.marked[index], ordinary.marked[index]):
                sys.exit(f"self-check: replayed, {name} holds other keys in layer {index}")


def run_case(model: PreTrainedModel, case: dict[str, Any], names: list[str], budgets: list[float]) -> dict[str, Any]:
    """The records of one case, what was refused, and the seconds of each part."""
    done: dict[str, Any] = {"records": [], "refused": {}, "seconds": {}}
    context, tokens, begun = case["context"], len(case["ids"]), time.perf_counter()

    def lap(part: str) -> None:
        nonlocal begun
        done["seconds"][part] = round(time.perf_counter() - begun, 2)
        begun = time.perf_counter()
        print(f"{context} {case['name']} {part}: {done['seconds'][part]} s", file=sys.stderr, flush=True)

    def record(method: str, budget: float, held: Held) -> None:
        kv_bytes = held.nbytes(model)
        if kv_bytes > budget * full + full // tokens:  # a token in every head, for rounding
            print(f"over budget: {method} holds {kv_bytes} of {full} bytes at {budget}", file=sys.stderr)
        of = {"method": method, "budget": budget, "context": context, "case": case["name"]}
        for continuation in case["continuations"]:
            nll, right = score(model, held, tokens, continuation)
            found = {"nll": nll, "right": right, "scored": continuation["scored"]}
            size = {"kv_bytes": kv_bytes, "kv_bytes_full": full}
            done["records"].append(of | {"form": continuation["form"]} | found | size)

    reading = read(model, torch.tensor([case["ids"]]))
    whole = take(model, reading.cache)
    full = whole.nbytes(model)
    lap("read")
    record("full", 1.0, whole)
    lap("full")
    for name in names:
        try:
            compress = compressor(model, name, reading, budgets)
        except ValueError as error:
            done["refused"][name] = str(error)
            continue
        for budget in budgets:
            try:
                held = compress(budget)
            except ValueError as error:
                done["refused"][f"{name}, budget {budget}, context {context}"] = str(error)
                continue
            record(name, budget, held)
        lap(name)
    return done


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def processor() -> str:
    """The processor's name, or its kind where the system does not tell."""
    listing = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", listing.read_text()) if listing.exists() else None
    return named[1] if named else platform.machine()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True, help="from benchmarks/cases.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", default="0.5,0.25,0.125", help="shares of the context's KV entries that are kept")
    parser.add_argument("--presses", default=",".join(PRESSES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--limit", type=int, help="cases of each context")
    parser.add_argument("--contexts", help="only cases of these contexts")
    arguments = parser.parse_args()
    names, budgets = arguments.presses.split(","), [float(budget) for budget in arguments.budgets.split(",")]
    if unknown := set(names) - set(PRESSES):
        parser.error(f"--presses: {', '.join(sorted(unknown))} unknown; there are {', '.join(PRESSES)}")
    given = arguments.cases.read_text(encoding="utf-8")
    listed = json.loads(given)
    contexts = sorted({case["context"] for case in listed["cases"]})
    if arguments.contexts:
        contexts = [int(context) for context in arguments.contexts.split(",")]
    cases = [
        c for context in contexts for c in [c for c in listed["cases"] if c["context"] == context][: arguments.limit]
    ]
    about = {
        "what": "kvpress presses on held-out cases: nll and answers once the context is compressed to a share (budget) of its "
        "KV entries; compression_ratio in a press's settings is then 1 - budget",
        "command": "python " + " ".join(sys.argv),
        "versions": {name: version(name) for name in ("kvpress", "torch", "transformers")},
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "cpu": processor()},
        "model": listed["model"],
        "dtype": arguments.dtype,
        "presses": {name: repr(PRESSES[name]()) + NOTES.get(name, "") for name in names},
    }

    # Finished cases are taken up again if they come from the same cases, presses, budgets and versions.
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    key = [hashlib.sha256(given.encode()).hexdigest(), budgets, about["versions"], about["dtype"], about["presses"]]
    done: dict[str, Any] = {"key": key, "cases": {}}
    if partial.exists():
        done = json.loads(partial.read_text(encoding="utf-8"))
        if done["key"] != key:
            sys.exit(f"{partial} is of a run with other cases or options: finish that one or remove the file")

    found: dict[str, Any] = {}
    model = load(listed["folder"], arguments.dtype)
    with mock.patch.object(duo_attention_press, "load_dataset", duo_texts):
        check(model, names)
        print("self-check passed", file=sys.stderr, flush=True)
        for case in cases:
            name = f"{case['context']} {case['name']}"
            if name not in done["cases"]:
                done["cases"][name] = run_case(model, case, names, budgets)
                write(partial, done)
            found[name] = done["cases"][name]
    refused = {name: reason for one in found.values() for name, reason in one["refused"].items()}
    records = [record for one in found.values() for record in one["records"]]
    seconds = {name: one["seconds"] for name, one in found.items()}
    write(arguments.out, about | {"refused": refused, "records": records, "seconds": seconds})
    partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()

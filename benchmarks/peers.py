"""Quality of the presses of NVIDIA's kvpress on the cases of plans.py, at the same KV bytes.

make peers   (installs kvpress into a separate environment, because it needs an older transformers, and runs all cases)

A press compresses the cache of a context before any continuation is known; then every continuation is scored on its own over the
compressed cache. The result has one record per case, press, budget and continuation, with the bytes of the cache.

- Presses compress a layer after its attention has run, so their inputs do not depend on them. The context is read once, and every
  press is replayed on the recorded inputs. A self-check at the start compares this with the ordinary use of each press.
- A compressed cache is shorter than the context. Every layer gets its own mask (all kept keys, causal among the continuation),
  and tokens keep their positions.
- Some presses do not remove keys but mark them per head; the library then replaces them in later attention by fake keys, searched
  so that no query attends to them. Here marked keys are masked per head, which gives the same results without a search that can
  fail. Their bytes count as freed, although the library keeps them.
- Layers with a sliding window are left unchanged and not counted.
- With --quantized N, every compressed cache is measured a second time after transformers' QuantizedCache has rounded it to N bits
  with HQQ, in its default settings. The bytes of its scales and zero points count. Continuations are not rounded, as there.
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
from dataclasses import dataclass, field
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
from transformers.cache_utils import HQQQuantizedLayer
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
logging.getLogger("kvpress").setLevel(logging.ERROR)  # presses warn at every start

CHECK_TOKENS, CHECK_BUDGET = 500, 0.8  # of the self-check: DuoAttention keeps at least 384 tokens, LagKV needs 260
PIECE = 2000  # characters of each text on which DuoAttention scores heads
PLACEHOLDER = torch.ones(1, 1, 1, 1, dtype=torch.bool)  # 4-D, so that the model does not create a mask


class KVzip(kvpress.KVzipPress):
    """KVzip with one reconstruction pass for all of `budgets`."""

    def choose(self, model: PreTrainedModel, ids: Tensor, budgets: list[float]) -> dict[float, Compressed]:
        """Compress a context, ids [1, tokens], as KVzip does; returns the compressed cache at each budget."""
        self.budgets, self.found = budgets, {}
        self.compression_ratio = 1 - min(budgets)  # any ratio above 0: at 0 the press does nothing
        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
        tokenizer.chat_template = (
            None  # with a template, the press takes the first tokens of the context for its prefix
        )
        with mock.patch.object(AutoTokenizer, "from_pretrained", return_value=tokenizer), self(model):
            model.model(input_ids=ids, past_key_values=DynamicCache(config=model.config))
        return self.found

    def compress_post(self, model: PreTrainedModel) -> None:
        """Run KVzip's last step once for each budget."""
        for budget in self.budgets:
            self.compression_ratio = 1 - budget
            super().compress_post(model)
            self.found[budget] = take(model, self._cache)


# Settings of kvpress's evaluation registry, or the defaults, which its documentation recommends.
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
    """A prefilled context: ids [1, tokens], the full cache, and the arguments of each compressible layer's attention."""

    ids: Tensor
    cache: DynamicCache
    calls: dict[int, dict[str, Any]]  # layer -> keyword arguments of its attention


@dataclass
class Compressed:
    """A compressed cache.

    marked: layer -> bool [KV heads, keys], True for keys in it that count as removed. sizes: layer -> bytes of all its keys and
    values, where they are not those of the tensors in `cache`.
    """

    cache: DynamicCache
    marked: dict[int, Tensor]
    sizes: dict[int, int] = field(default_factory=dict)

    def nbytes(self, model: PreTrainedModel) -> int:
        """Return the bytes of unmarked keys and values, in the layers without a sliding window."""
        total = 0
        for index in (module.layer_idx for module in compressible(model)):
            layer, marked = self.cache.layers[index], self.marked[index]
            size = self.sizes.get(index, layer.keys.nbytes + layer.values.nbytes)
            total += size * int((~marked).sum()) // marked.numel()
        return total

    def quantize(self, model: PreTrainedModel, bits: int) -> Compressed:
        """Return the cache as transformers' QuantizedCache holds it, in the layers without a sliding window."""
        cache, sizes = fork(self.cache), {}
        for index in (module.layer_idx for module in compressible(model)):
            layer, own = cache.layers[index], HQQQuantizedLayer(nbits=bits)
            own.update(layer.keys, layer.values)
            stored = own._quantized_keys, own._quantized_values  # packed integers, and scales and zero points
            sizes[index] = sum(
                packed.nbytes + sum(meta[name].nbytes for name in ("scale", "zero")) for packed, meta in stored
            )
            layer.keys, layer.values = (own._dequantize(part).view_as(layer.keys).to(layer.keys) for part in stored)
        return Compressed(cache, self.marked, sizes)


def attention(model: PreTrainedModel) -> list[nn.Module]:
    """Return the attention module of every layer."""
    return [layer.self_attn for layer in model.model.layers]


def slides(module: nn.Module) -> bool:
    """Return whether an attention module has a sliding window."""
    return getattr(module, "is_sliding", False)


def compressible(model: PreTrainedModel) -> list[nn.Module]:
    """Return the attention modules without a sliding window."""
    return [module for module in attention(model) if not slides(module)]


def load(folder: str, dtype: str) -> PreTrainedModel:
    """Load the model and put its rotary embedding where presses expect it."""
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    rotary = model.model.rotary_emb
    if any(map(slides, attention(model))):  # Gemma 3 has two rotary embeddings, and presses do not pass the layer type
        forward = rotary.forward
        rotary.forward = lambda x, position_ids, layer_type="full_attention": forward(x, position_ids, layer_type)
    for module in attention(model):
        module.rotary_emb = rotary
    return model


def fork(cache: DynamicCache) -> DynamicCache:
    """Return a copy of a cache that shares its tensors. Updates replace tensors, so they do not change the original."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked


def read(model: PreTrainedModel, ids: Tensor) -> Reading:
    """Prefill a context, ids [1, tokens], without compression."""
    calls: dict[int, dict[str, Any]] = {}

    def record_call(module: nn.Module, _: Any, kwargs: dict[str, Any], __: Any) -> None:
        calls[module.layer_idx] = kwargs

    cache = DynamicCache(config=model.config)
    with ExitStack() as hooks:
        for module in compressible(model):
            hooks.enter_context(module.register_forward_hook(record_call, with_kwargs=True))
        model.model(input_ids=ids, past_key_values=cache)
    return Reading(ids, cache, calls)


def take(model: PreTrainedModel, cache: DynamicCache) -> Compressed:
    """Return the contents of a cache and the keys that a press has marked on the attention modules, and clear the marks."""
    marked = {}
    for module in attention(model):
        marked[module.layer_idx] = torch.zeros(cache.layers[module.layer_idx].keys.shape[1:3], dtype=torch.bool)
        indices = getattr(module, "masked_key_indices", None)  # (batch, head, key)
        if indices is not None:
            marked[module.layer_idx][indices[1:]] = True
        module.masked_key_indices = None
    return Compressed(fork(cache), marked)


def seed(module: nn.Module, _: Any = None) -> None:
    """Seed Compactor's random sketch by layer, so that it is the same in every run."""
    torch.manual_seed(module.layer_idx)


def set_budget(model: PreTrainedModel, press: kvpress.BasePress, budget: float, tokens: int) -> None:
    """Make a press keep `budget` of the KV entries of `tokens` tokens. Raises ValueError if it cannot."""
    press.post_init_from_model(model)
    if not isinstance(press, kvpress.DuoAttentionPress):
        press.compression_ratio = 1 - budget
        return
    kept = press.sink_size + press.recent_size
    if kept > budget * tokens:
        raise ValueError(f"a streaming head keeps {kept} tokens, which alone exceeds the budget")
    heads = press.streaming_mask.numel()
    press.head_compression_ratio = math.ceil(heads * (1 - budget) / (1 - kept / tokens)) / heads
    press.post_init_from_model(model)


def compressor(
    model: PreTrainedModel, name: str, reading: Reading, budgets: list[float]
) -> Callable[[float], Compressed]:
    """Return a function from a budget to the cache that the press compresses the context to.

    Both raise ValueError where the press does not support the model or the budget.
    """
    press = PRESSES[name]()
    if isinstance(press, KVzip):
        return press.choose(model, reading.ids, budgets).__getitem__
    if isinstance(press, kvpress.DuoAttentionPress) and any(map(slides, attention(model))):
        raise ValueError("it ranks the heads of all layers together, also of those with a sliding window")

    def compress(budget: float) -> Compressed:
        set_budget(model, press, budget, reading.ids.shape[1])
        cache = fork(reading.cache)
        for module in compressible(model):
            seed(module)
            press.forward_hook(module, [], reading.calls[module.layer_idx] | {"past_key_values": cache}, [None, None])
        return take(model, cache)

    return compress


def score(
    model: PreTrainedModel, compressed: Compressed, start: int, continuation: dict[str, Any]
) -> tuple[float, bool]:
    """Return the mean NLL of a continuation's scored tokens, and whether each is the most likely token.

    start: position of the continuation's first token.
    """

    def set_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Let new tokens attend to unmarked cached keys, and causally to each other, within the layer's window."""
        marked, new = compressed.marked[module.layer_idx], kwargs["hidden_states"].shape[1]
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
            hooks.enter_context(module.register_forward_pre_hook(set_mask, with_kwargs=True))
        output = model(
            ids,
            past_key_values=fork(compressed.cache),
            position_ids=torch.arange(start, start + ids.shape[1])[None],
            attention_mask=PLACEHOLDER,
            logits_to_keep=scored + 1,
        )
    logits, targets = output.logits[0, :-1].float(), ids[0, -scored:]  # [scored, vocabulary], [scored]
    return nn.functional.cross_entropy(logits, targets).item(), bool((logits.argmax(-1) == targets).all())


def duo_texts(*_: Any, **__: Any) -> SimpleNamespace:
    """Replace the data set BookSum, which would have to be downloaded."""
    names = [
        name for name in sorted(topics) if hashlib.sha256(name.encode()).digest()[0] < 128
    ]  # as headsink.data.corpus
    pieces = [topics[name][at : at + PIECE] for name in names for at in range(0, len(topics[name]) - PIECE, PIECE)]
    return SimpleNamespace(to_pandas=lambda: pandas.DataFrame({"chapter": pieces}))


def check(model: PreTrainedModel, names: list[str]) -> None:
    """Exit if a replayed press keeps other keys than the press in ordinary use, or if masks or positions are wrong."""
    ids = torch.randint(model.config.vocab_size, (1, CHECK_TOKENS + 50), generator=torch.Generator().manual_seed(0))
    reading = read(model, ids[:, :CHECK_TOKENS])
    found, _ = score(model, take(model, reading.cache), CHECK_TOKENS, {"ids": ids[0, -50:].tolist(), "scored": 49})
    logits = model(ids, logits_to_keep=50).logits[0, :-1].float()
    expected = nn.functional.cross_entropy(logits, ids[0, -49:]).item()
    if abs(found - expected) > (1e-4 if model.dtype == torch.float32 else 0.05):
        sys.exit(f"self-check: NLL {found} in two passes, {expected} in one")
    for name in names:
        if PRESSES[name] is KVzip:  # not replayed
            continue
        try:
            replayed = compressor(model, name, reading, [])(CHECK_BUDGET)
        except ValueError:  # refused; run_case records it
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
                sys.exit(f"self-check: replayed, {name} keeps other keys in layer {index}")


def run_case(
    model: PreTrainedModel, case: dict[str, Any], names: list[str], budgets: list[float], bits: int | None
) -> dict[str, Any]:
    """Return the records of one case, the refused presses and budgets, and the seconds of each part."""
    done: dict[str, Any] = {"records": [], "refused": {}, "seconds": {}}
    context, tokens, start = case["context"], len(case["ids"]), time.perf_counter()

    def lap(part: str) -> None:
        nonlocal start
        done["seconds"][part] = round(time.perf_counter() - start, 2)
        start = time.perf_counter()
        print(f"{context} {case['name']} {part}: {done['seconds'][part]} s", file=sys.stderr, flush=True)

    def record(method: str, budget: float, compressed: Compressed) -> None:
        kv_bytes = compressed.nbytes(model)
        if kv_bytes > budget * full + full // tokens:  # one token per head more, for rounding
            print(f"over budget: {method} keeps {kv_bytes} of {full} bytes at {budget}", file=sys.stderr)
        if bits is not None and not compressed.sizes:
            record(f"{method}, QuantizedCache int{bits}", budget, compressed.quantize(model, bits))
        identity = {"method": method, "budget": budget, "context": context, "case": case["name"]}
        for continuation in case["continuations"]:
            nll, right = score(model, compressed, tokens, continuation)
            found = {"nll": nll, "right": right, "scored": continuation["scored"]}
            size = {"kv_bytes": kv_bytes, "kv_bytes_full": full}
            done["records"].append(identity | {"form": continuation["form"]} | found | size)

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
                compressed = compress(budget)
            except ValueError as error:
                done["refused"][f"{name}, budget {budget}, context {context}"] = str(error)
                continue
            record(name, budget, compressed)
        lap(name)
    return done


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def processor() -> str:
    """Return the name of the processor, or its architecture where the name is unknown."""
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
    parser.add_argument("--quantized", type=int, choices=(1, 2, 3, 4, 8), metavar="BITS", help="needs pip install hqq")
    parser.add_argument("--limit", type=int, help="cases of each context")
    parser.add_argument("--contexts", help="only cases of these contexts")
    arguments = parser.parse_args()
    names, budgets = arguments.presses.split(","), [float(budget) for budget in arguments.budgets.split(",")]
    if unknown := set(names) - set(PRESSES):
        parser.error(f"--presses: {', '.join(sorted(unknown))} unknown; there are {', '.join(PRESSES)}")
    case_text = arguments.cases.read_text(encoding="utf-8")
    case_file = json.loads(case_text)
    contexts = sorted({case["context"] for case in case_file["cases"]})
    if arguments.contexts:
        contexts = [int(context) for context in arguments.contexts.split(",")]
    cases = [
        c for context in contexts for c in [c for c in case_file["cases"] if c["context"] == context][: arguments.limit]
    ]
    about = {
        "what": "kvpress presses on held-out cases: NLL, and correct answers after the context was compressed to a "
        "share (budget) of its KV entries; compression_ratio in a press's settings is 1 - budget",
        "command": "python " + " ".join(sys.argv),
        "versions": {name: version(name) for name in ("kvpress", "torch", "transformers")},
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "cpu": processor()},
        "model": case_file["model"],
        "dtype": arguments.dtype,
        "presses": {name: repr(PRESSES[name]()) + NOTES.get(name, "") for name in names},
    }

    # Finished cases are reused if the cases, presses, budgets and versions are the same.
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    key = [
        hashlib.sha256(case_text.encode()).hexdigest(),
        budgets,
        about["versions"],
        about["dtype"],
        about["presses"],
        arguments.quantized,
    ]
    done: dict[str, Any] = {"key": key, "cases": {}}
    if partial.exists():
        done = json.loads(partial.read_text(encoding="utf-8"))
        if done["key"] != key:
            sys.exit(f"{partial} belongs to a run with other cases or options: finish that run or remove the file")

    found: dict[str, Any] = {}
    model = load(case_file["folder"], arguments.dtype)
    with mock.patch.object(duo_attention_press, "load_dataset", duo_texts):
        check(model, names)
        print("self-check passed", file=sys.stderr, flush=True)
        for case in cases:
            name = f"{case['context']} {case['name']}"
            if name not in done["cases"]:
                done["cases"][name] = run_case(model, case, names, budgets, arguments.quantized)
                write(partial, done)
            found[name] = done["cases"][name]
    refused = {name: reason for one in found.values() for name, reason in one["refused"].items()}
    records = [record for one in found.values() for record in one["records"]]
    seconds = {name: one["seconds"] for name, one in found.items()}
    write(arguments.out, about | {"refused": refused, "records": records, "seconds": seconds})
    partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()

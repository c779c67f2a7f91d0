"""What `speed.py` and `memory.py` share: a model under plans next to transformers and peers, case by case."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

import headsink
from headsink.attention.formats import KVDtype
from headsink.bench.heading import provenance
from headsink.bench.options import check_contexts, contexts_for
from headsink.bench.peers import process as peers
from headsink.data import corpus
from headsink.models.devices import dtype_name
from headsink.models.spec import describe
from headsink.models.transformers_names import cache_argument, returned_cache
from headsink.plan.plan import Plan

BASE = "transformers"  # the baseline of all ratios, in the requested dtype
ATTENTION = re.compile(r"aten\._(scaled_dot_product|flash_attention|efficient_attention)")  # operators of torch
Prompts = list[list[int]]  # token ids of a batch, all of one length


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    contexts: tokens of prompts; None: those of `options.CONTEXTS` that fit. tokens: to generate. batches: batch sizes. kv_dtypes:
    of the caches under plans (`headsink.new_cache`). other_weights: accept plans calibrated with other weights of the same
    shape. llama_cpp, vllm: where the peers are installed (peers/process.py). report: called with the table of each finished
    context and batch size.
    """

    model_name: str
    contexts: Sequence[int] | None
    rounds: int
    tokens: int = 4
    batches: Sequence[int] = (1,)
    plans: Mapping[str, Plan] = field(default_factory=dict)
    kv_dtypes: Sequence[KVDtype] = ("auto",)
    other_weights: bool = False
    llama_cpp: Path | None = None
    vllm: Path | None = None
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    report: Callable[[str], None] | None = None


class Cases:
    """A comparison whose model is loaded, and its result.

    options: with the plans for this model. contexts: tokens of its prompts. installed: the peers that run here. found: the
    result, without rows.
    """

    def __init__(self, options: Comparison, what: str):
        peers.check(options.llama_cpp, options.vllm)
        self.model: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase
        self.model, self.tokenizer = headsink.load(options.model_name, dtype=options.dtype, device=options.device)
        most, plans = describe(self.model).max_context, options.plans
        if options.other_weights:
            plans = {name: plan.for_model(self.model) for name, plan in plans.items()}
        contexts = contexts_for(most, options.tokens) if options.contexts is None else options.contexts
        check_contexts(contexts, options.tokens, most)
        self.contexts = contexts
        self.options = replace(options, plans=plans)
        self.installed, missing = peers.find(options.model_name, self.model, options.llama_cpp, options.vllm)
        self.found: dict[str, Any] = provenance(what) | {
            "model": options.model_name,
            "dtype": dtype_name(self.model.dtype),
            "device": str(self.model.device),
            "baseline_kernels": attention_kernels(self.model),
            "plans": {name: plan.counts() for name, plan in plans.items()},
            "peers": [{"peer": peer.name, "version": peer.version} for peer in self.installed]
            + [peer.to_dict() for peer in missing],
            "tokens": options.tokens,
            "rounds": options.rounds,
            "results": [],
        }

    def prompts(self, context: int, batch: int) -> Prompts:
        """Return `batch` different prompts of `context` tokens from the held-out split."""
        seeds = range(self.options.seed, self.options.seed + batch)
        return [corpus.tokens("prose", self.tokenizer, context, seed=seed, split="heldout") for seed in seeds]

    def __iter__(self) -> Iterator[tuple[int, int, Prompts]]:
        """Yield context, batch size and prompts of each case."""
        for context in self.contexts:
            for batch in self.options.batches:
                yield context, batch, self.prompts(context, batch)

    def add(
        self,
        context: int,
        batch: int,
        summaries: Mapping[str, dict[str, Any]],
        plans: Mapping[str, Plan],
        table: Callable[[dict[str, Any], int, int], str],
    ) -> None:
        """Add the rows of a case to the result, and report its table. plans: by the names of rows that have one."""
        for name, summary in summaries.items():
            row: dict[str, Any] = {"context": context, "batch": batch, "way": name}
            row |= {"kept": plans[name].kv_budget(context)} if name in plans else {}
            self.found["results"].append(row | summary)
        if self.options.report is not None:
            self.options.report(table(self.found, context, batch))

    def lose(self, peer: str, error: peers.Failed) -> None:
        """Record that a peer failed."""
        for one in self.found["peers"]:
            if one["peer"] == peer:
                one["missing"] = str(error)


class _Operators(TorchDispatchMode):
    """Record which of torch's attention operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if ATTENTION.match(str(func)):
            self.names.add(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def attention_kernels(model: PreTrainedModel) -> dict[str, Any]:
    """Return the attention that transformers runs the model with, and torch's operators that it ends in.

    For prompts and for single tokens; there are none for "eager".
    """
    prompt = torch.ones(1, 64, dtype=torch.long, device=model.device)
    found: dict[str, Any] = {"attention": model.config._attn_implementation}
    cache: Cache | None = None
    for what, ids in (("prefill", prompt), ("decode", prompt[:, :1])):
        with torch.no_grad(), _Operators() as operators:
            cache = returned_cache(model(ids, use_cache=True, **cache_argument(cache)))
        found[what] = sorted(operators.names)
    return found


def kv_token_bytes(model: PreTrainedModel) -> int:
    """Return the bytes that the full KV cache takes per token of one sequence, sliding-window layers counted as full."""
    shape = describe(model)
    return int(2 * shape.layers * shape.kv_heads * shape.head_dim * model.dtype.itemsize)


def format_kv(row: dict[str, Any], width: int = 0) -> str:
    """Format the KV cache bytes of a row, and their ratio to those of transformers."""
    known = row["kv_bytes"] is not None
    return f"KV {row['kv_bytes'] / 1e6:{width}.1f} MB, {row['kv_ratio']:.3f}" if known else "KV unknown"

"""Whole models with random weights for gpu.py: TTFT, TPOT, lossless mode, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import MODELS, REHEARSED, patterns
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache, LlamaConfig

from headsink import Plan, apply, new_cache
from headsink.cache.cache import PlanCache, nbytes
from headsink.decoding.cuda import Decoder, Pass
from headsink.eviction.scorers import LINEAR
from headsink.generation.sequences import Speculation
from headsink.generation.speculative import SpeculativeDecoder, draft_cache
from headsink.models.transformers_names import cache_argument

WIDTHS = {"Llama-3.1-8B": (4096, 14_336, 32, 128_256, False), "Llama-3.2-1B": (2048, 8192, 16, 128_256, True)}
TOKENS = 24  # number of decoded, timed tokens
FIXED = "fixed_length"  # attention by SDPA's flash kernel over a cache of fixed length


class FixedCache:
    """Keys and values of fixed length whose last position is the new token's, so that a CUDA graph can hold full attention."""

    def __init__(self, layers: int, batch: int, heads: int, context: int, dim: int, device: torch.device):
        self.keys, self.values = (
            [_random(batch, heads, context, dim, device) for _ in range(layers)] for _ in range(2)
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, -1:], values[:, :, -1:] = key, value
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):  # MATH is for rehearsals without a GPU
            return F.scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=True)


_fixed: list[FixedCache] = []


def _flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **_: Any
) -> Any:
    return _fixed[-1].attend(int(module.layer_idx), query, key, value, scaling).transpose(1, 2), None  # type: ignore[arg-type]


AttentionInterface.register(FIXED, _flash)
AttentionMaskInterface.register(FIXED, lambda *_, **__: None)


def _random(batch: int, heads: int, context: int, dim: int, device: torch.device) -> Tensor:
    return torch.randn(batch, heads, context, dim, device=device, dtype=torch.bfloat16)


class Rig:
    """A model that is made on first access, and the measurements of it."""

    def __init__(self, clock: Any, name: str, small: bool):
        self.clock, self.name, self.small, self.heads = clock, name, small, REHEARSED if small else MODELS[name]
        self._model: Any = None

    @property
    def model(self) -> Any:
        if self._model is None:
            hidden, inner, layers, vocabulary, tied = (256, 256, 2, 500, True) if self.small else WIDTHS[self.name]
            config = LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=self.heads.query,
                num_key_value_heads=self.heads.kv,
                head_dim=self.heads.dim,
                max_position_embeddings=2**18,
                tie_word_embeddings=tied,
                dtype="bfloat16",
            )
            with self.clock.device:
                self._model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        return self._model

    def close(self) -> None:
        self._model = None
        if self.clock.device.type == "cuda":
            torch.cuda.empty_cache()

    def fits(self, context: int, batch: int, lossless: bool = False) -> bool:
        """Return whether the card has room for the weights, a full cache, and the plan's cache."""
        if self.small:
            return True
        hidden, inner, layers, vocabulary, tied = WIDTHS[self.name]
        weights = 2 * (layers * hidden * (2.5 * hidden + 3 * inner) + vocabulary * hidden * (1 if tied else 2))
        cache = layers * 2 * 2 * batch * self.heads.kv * context * self.heads.dim
        card: float = torch.cuda.get_device_properties(self.clock.device).total_memory
        return weights + cache * (1.3 if lossless else 1.05) < 0.92 * card

    def plan(self, budget: float, context: int) -> Plan:
        """Return a plan of this budget in every layer; the heads' sizes rotate from layer to layer."""
        if budget == 1:
            return Plan.full(self.model)
        layers, heads = self.model.config.num_hidden_layers, self.heads.kv
        row = patterns(budget, context, heads)
        weights = torch.randn(layers, heads, LINEAR.n_features(self.heads.dim))
        return Plan.of(self.model, [row[n % heads :] + row[: n % heads] for n in range(layers)], weights)

    def random_cache(self, plan: Plan, context: int, batch: int) -> PlanCache:
        """Return a plan's cache of random keys and values."""
        cache = new_cache(self.model, plan, exact=False)
        shape = batch, self.heads.kv, context, self.heads.dim
        for layer in cache.layers:
            layer.fill(*(_random(*shape, self.clock.device) for _ in range(2)), None)  # type: ignore[attr-defined]
        return cache

    def decode(self, context: int, batch: int, budgets: Sequence[float]) -> list[dict[str, Any]]:
        """Time decoding of a token of every sequence, as a CUDA graph: under plans, and with full attention by SDPA."""
        tokens = torch.randint(3, 400, (batch,), device=self.clock.device)
        rows = [{"way": "full by sdpa's flash", "seconds": self._flash_decode(context, batch)}]
        for budget in budgets:
            plan = self.plan(budget, context)
            with torch.no_grad(), apply(self.model, plan):
                cache = self.random_cache(plan, context, batch)
                step = Decoder(self.model, cache)
                for _ in range(3):
                    step.run(tokens)
                seconds = self.clock.host(lambda step=step: step.run(tokens), 2 if self.small else TOKENS)  # type: ignore[misc]
                step.start_evicting()
            kv_bytes = nbytes(cache)
            whole = 2 * 2 * batch * len(cache.layers) * self.heads.kv * context * self.heads.dim
            rows.append(
                {
                    "way": "headsink",
                    "budget": budget,
                    "seconds": seconds,
                    "times_flash": rows[0]["seconds"]["median"] / seconds["median"],  # type: ignore[index]
                    "kv_bytes": kv_bytes,
                    "kv_ratio": kv_bytes / whole,
                }
            )
            del cache, step
        return rows

    def _flash_decode(self, context: int, batch: int) -> dict[str, Any]:
        config, device = self.model.config, self.clock.device
        _fixed.append(FixedCache(config.num_hidden_layers, batch, self.heads.kv, context, self.heads.dim, device))
        before = config._attn_implementation
        self.model.set_attn_implementation(FIXED)
        one = Pass(batch, 1, device)
        one.place.fill_(context - 1)

        def work(one: Pass) -> None:
            one.logits = self.model(one.token, position_ids=one.place, use_cache=False).logits.float()

        try:
            with torch.no_grad():
                for _ in range(3):
                    one.run(work)
                return dict(self.clock.host(lambda: one.run(work), 2 if self.small else TOKENS))
        finally:
            self.model.set_attn_implementation(before)
            _fixed.clear()

    def first_token(self, context: int, budgets: Sequence[float]) -> list[dict[str, Any]]:
        """Time prefill and measure its peak memory: transformers, and headsink at several budgets."""
        ids = torch.randint(3, 400, (1, context), device=self.clock.device)
        rows: list[dict[str, Any]] = []

        def read(cache: Any) -> None:
            self.model(ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)

        def measure(name: str, backends: Sequence[Any] = (), **more: Any) -> dict[str, Any]:
            cuda = self.clock.device.type == "cuda"
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            plan = more.pop("plan", None)
            with torch.no_grad():
                for _ in range(2):  # the first run compiles the kernels
                    if plan is None:
                        with sdpa_kernel([*backends]) if backends else nullcontext():
                            seconds = self.clock.host(lambda: read(DynamicCache(config=self.model.config)), 1)
                    else:
                        with apply(self.model, plan):
                            seconds = self.clock.host(lambda: read(new_cache(self.model, plan, exact=False)), 1)
            peak = torch.cuda.max_memory_allocated() if cuda else 0
            return {"way": name, "seconds": seconds, "peak_bytes": peak} | more

        rows.append(measure("transformers, sdpa"))  # with the kernel that PyTorch chooses: cuDNN's on an H100
        rows.append(measure("transformers, sdpa's flash", (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)))
        for budget in budgets:
            rows.append(measure("headsink", budget=budget, plan=self.plan(budget, context)))
            for name, other in zip(("times_sdpa", "times_flash"), rows, strict=False):
                rows[-1][name] = other["seconds"]["median"] / rows[-1]["seconds"]["median"]
        return rows

    def lossless(self, context: int, batch: int, budget: float) -> list[dict[str, Any]]:
        """Time lossless mode against decoding with the full cache, with every draft accepted.

        Heads that evict keys get zero output weights, so drafts equal the full cache's tokens. The result is the upper bound; the
        acceptance rate depends on the model and the plan.
        """
        plan, model, device = self.plan(budget, context), self.model, self.clock.device
        dim, group = self.heads.dim, self.heads.query // self.heads.kv
        for layer, heads in zip(model.model.layers, plan.layers, strict=True):
            for number, head in enumerate(heads or ()):
                if not head.pattern.full:
                    layer.self_attn.o_proj.weight.data[:, number * group * dim : (number + 1) * group * dim] = 0
        plan, full_plan = self.plan(budget, context), Plan.full(model)  # again, because the weights have changed
        ids = torch.randint(3, 400, (batch, 2), device=device)
        with torch.no_grad(), apply(model, full_plan):
            full = self.random_cache(full_plan, context, batch)
            step = Decoder(model, full)
            for _ in range(3):
                step.run(ids[:, 0])
            count = 2 if self.small else TOKENS
            full_seconds = self.clock.host(lambda: step.run(ids[:, 0]), count)
            step.start_evicting()
            draft, counts = draft_cache(model, plan, full), Speculation()
            rounds = 2 if self.small else 8
            positions = torch.full((batch,), full.get_seq_length(), device=device)
            state = SpeculativeDecoder(model, ids[:, -1:], positions, full, draft)

            def run(new: int) -> None:
                ends = state.texts[0].shape[0] + new
                state.rows = list(range(batch))
                state.run(
                    lambda _, __, logits: logits,
                    lambda text, _: torch.tensor([text.shape[1] >= ends]),
                    sample=False,
                    drafted=4,
                    told=counts,
                )

            run(5 * (1 if self.small else 2))
            before = counts.passes
            seconds = self.clock.host(lambda: run(5 * rounds), 1)
        token_seconds = seconds["median"] / (5 * rounds)
        return [
            {"way": "headsink, full", "seconds": full_seconds},
            {
                "way": "headsink, lossless, drafts of 4",
                "budget": budget,
                "token_s": token_seconds,
                "times_full": full_seconds["median"] / token_seconds,
                "acceptance": counts.acceptance,
                "passes": counts.passes - before,
            },
        ]

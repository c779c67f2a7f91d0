"""Choose a pattern for every KV head under a budget, by forward passes alone.

For each KV head and candidate pattern, the squared error of the head's output after W_O, relative to the layer's output,
is measured at queries of natural text and at the answers of retrieval probes. An average over text does not see
retrieval (six answer tokens in two thousand), so the two are averaged apart and added. A Lagrangian knapsack then finds
the patterns with the least total error whose keys fit the budget. quality.py measures what the plan costs, end to end,
on other text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink import corpus, probes
from headsink.architecture import Architecture, check_plannable, decoder, describe
from headsink.attention import Seen, engaged, observing
from headsink.errors import HeadsinkError
from headsink.models import dtype_name
from headsink.output import OutputNorms
from headsink.pattern import FULL, Pattern, visible
from headsink.plan import Plan
from headsink.progress import bar
from headsink.quality import measure

SINK, FLOATING, TAU = 4, 16, 0.4  # facts of SmolLM2: about 5 floating sinks a head are found with tau = 0.4
WINDOWS = (0, 32, 128, 512)  # well below TEXT_TOKENS, or their errors would not show
RETRIEVAL_WEIGHT = 1.0
TEXT_TOKENS = 2048  # length of a calibration text
SAMPLED_QUERIES = (
    256  # queries of a natural text at which errors are measured, evenly spaced over its last three quarters
)
PROBE_DEPTHS = (0.15, 0.6)
QUALITY_CONTEXTS = (1024, 2048)


@dataclass(frozen=True)
class Errors:
    """Mean squared relative output errors, float64 [layers, KV heads, patterns], NaN in layers that slide by themselves.

    value_norms: float64 [layers, KV heads], the mean over texts of the median value norm.
    """

    patterns: tuple[Pattern, ...]
    natural: Tensor
    retrieval: Tensor
    value_norms: Tensor

    def cost(self, retrieval_weight: float) -> Tensor:
        return self.natural + retrieval_weight * self.retrieval


def candidates(context: int) -> tuple[Pattern, ...]:
    """The patterns that a head may get besides full attention: windows with and without floating sinks."""
    patterns = [Pattern(SINK, floating, window) for window in WINDOWS for floating in (0, FLOATING)]
    return tuple(p for p in patterns if p.size(context) < context)


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    budget: float,
    context: int,
    retrieval_weight: float = RETRIEVAL_WEIGHT,
    quality_contexts: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Make a plan that keeps at most `budget` of the KV entries at `context` tokens.

    Parameters
    ----------
    budget : fraction of the full KV cache, over the heads that do not slide by themselves; above 0, at most 1.
    context : tokens of context for which the budget holds.
    retrieval_weight : weight of the error on retrieval against that on natural text.
    quality_contexts : lengths at which the plan is measured on held-out text; () to leave that out.
    progress : show bars on standard error.

    Returns
    -------
    Plan, with its measured quality.
    """
    shape = describe(model)
    check_plannable(shape)
    _check(budget, context, shape)
    length = min(TEXT_TOKENS, context)
    errors = measure_errors(model, tokenizer, candidates(context), length, seed=seed, progress=progress)
    patterns = choose(errors, budget, context, retrieval_weight)
    chosen: list[list[Pattern] | None] = [
        None if window else patterns[layer] for layer, window in enumerate(shape.windows)
    ]
    plan = Plan.of(
        model,
        chosen,
        errors.value_norms.tolist(),
        tau=TAU,
        calibration={
            "budget": budget,
            "context": context,
            "kept": round(_kept(patterns, context), 4),
            "retrieval_weight": retrieval_weight,
            "text_tokens": length,
            "texts": dict.fromkeys(corpus.DOMAINS, 1) | {form: len(PROBE_DEPTHS) for form in probes.FORMS},
            "dtype": dtype_name(model.dtype),
            "seed": seed,
        },
    )
    if quality_contexts is None:
        quality_contexts = [n for n in QUALITY_CONTEXTS if n <= shape.max_context]
    quality = [measure(model, tokenizer, plan, n, seed=seed, progress=progress) for n in quality_contexts]
    return plan.model_copy(update={"quality": tuple(quality)})


def _check(budget: float, context: int, shape: Architecture) -> None:
    if not 0 < budget <= 1:
        raise HeadsinkError(f"budget: {budget} is outside (0, 1]; 0.25 keeps a quarter of the KV cache")
    if not 64 <= context <= shape.max_context:
        raise HeadsinkError(f"context: {context} is outside 64 to {shape.max_context}, the model's maximum")
    if all(shape.windows):
        raise HeadsinkError("every layer of this model slides by itself: there is nothing to plan")


# errors


def measure_errors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    patterns: tuple[Pattern, ...],
    length: int,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Errors:
    """Run the calibration texts and probes and measure every KV head under every pattern."""
    shape = describe(model)
    texts: list[tuple[list[int], Tensor, bool]] = []  # token ids, query rows, is it a probe
    for domain in corpus.DOMAINS:
        ids = corpus.tokens(domain, tokenizer, length, seed=seed, split="calibration")
        rows = torch.linspace(length // 4, length - 1, min(SAMPLED_QUERIES, length - length // 4)).long()
        texts.append((ids, rows, False))
    for form in probes.FORMS:
        for depth in PROBE_DEPTHS:
            probe = probes.probe(form, tokenizer, length, depth=depth, seed=seed, split="calibration")
            last = len(probe.ids) - 1
            texts.append((probe.ids, torch.arange(last - probe.answer_tokens, last), True))
    sums = torch.zeros(2, shape.layers, shape.kv_heads, len(patterns), dtype=torch.float64)
    norms = torch.zeros(shape.layers, shape.kv_heads, dtype=torch.float64)
    with bar("calibration", len(texts) * shape.layers, progress) as shown:
        for ids, rows, is_probe in texts:

            def see(seen: Seen, rows: Tensor = rows, is_probe: bool = is_probe) -> None:
                shown.advance(shown.task_ids[0])
                if shape.windows[seen.layer] is None:
                    found, median = pattern_errors(seen, rows, patterns)
                    sums[int(is_probe), seen.layer] += found
                    norms[seen.layer] += median

            with torch.no_grad(), engaged(model), observing(see):
                decoder(model)(torch.tensor([ids], device=model.device), use_cache=False)
    sums[:, [window is not None for window in shape.windows]] = float("nan")
    probed = sum(is_probe for *_, is_probe in texts)
    return Errors(patterns, sums[0] / (len(texts) - probed), sums[1] / probed, norms / len(texts))


def pattern_errors(seen: Seen, rows: Tensor, patterns: Sequence[Pattern]) -> tuple[Tensor, Tensor]:
    """Errors of one layer on one text, averaged over the queries `rows`.

    Returns float64 [KV heads, patterns], and float64 [KV heads] with the median value norms that floating sinks were
    measured against.
    """
    query, key, value, output = (t[0].float() for t in (seen.query, seen.key, seen.value, seen.output))
    kv_heads, length, dim = key.shape
    rows = rows.to(key.device)
    norms = OutputNorms(seen.module, kv_heads, dim)
    full = output[:, rows]
    layer = norms.layer(full).clamp(min=torch.finfo(torch.float32).tiny)
    value_norm = value.norm(dim=-1)
    median = value_norm.median(-1).values
    short = value_norm < TAU * median[:, None]
    columns = torch.arange(length, device=key.device)
    logits = query[:, rows].view(kv_heads, -1, dim) @ key.transpose(-1, -2) * seen.scaling
    logits = logits.view(kv_heads, -1, len(rows), length).masked_fill_(columns > rows[:, None], float("-inf"))
    weights = logits.softmax(-1)  # [KV heads, group, rows, keys]
    errors = []
    for pattern in patterns:
        kept = weights * visible(pattern, rows, columns, short)[:, None]
        total = kept.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        lossy = (kept @ value[:, None] / total).flatten(0, 1)  # [query heads, rows, dim]
        errors.append((norms.groups(full - lossy) / layer).double().mean(-1))
    return torch.stack(errors, -1).cpu(), median.double().cpu()


# choice


def choose(errors: Errors, budget: float, context: int, retrieval_weight: float) -> dict[int, list[Pattern]]:
    """The patterns of least total error that fit the budget: layer -> a pattern per KV head.

    A Lagrangian knapsack: every head takes the pattern with the least error + price x keys; the price is the lowest one at
    which all fit. What is left of the budget goes to the best single improvements.
    """
    cost = errors.cost(retrieval_weight)
    layers = [layer for layer in range(cost.shape[0]) if not cost[layer].isnan().any()]
    options = (*errors.patterns, FULL)
    sizes = torch.tensor([p.size(context) for p in options], dtype=torch.float64)
    table = torch.cat([cost[layers].flatten(0, 1), torch.zeros(len(layers) * cost.shape[1], 1)], 1)  # [heads, options]
    allowed = budget * context * len(table)
    if sizes.min() * len(table) > allowed:
        least = float(sizes.min()) / context
        raise HeadsinkError(f"budget: {budget} of {context} tokens is less than the smallest plan, {least:.3f}")
    low, high = 0.0, 1.0
    while sizes[_cheapest(table, sizes, high)].sum() > allowed:
        high *= 2
    for _ in range(80):
        price = (low + high) / 2
        low, high = (price, high) if sizes[_cheapest(table, sizes, price)].sum() > allowed else (low, price)
    pick = _cheapest(table, sizes, high)
    while True:
        left = allowed - sizes[pick].sum()
        gain = table.gather(1, pick[:, None]) - table
        growth = sizes - sizes[pick][:, None]
        worth = torch.where((gain > 0) & (growth <= left), gain / growth.clamp(min=1e-9), 0.0)
        if not worth.max() > 0:
            break
        head, option = divmod(int(worth.argmax()), len(options))
        pick[head] = option
    rows = pick.view(len(layers), -1).tolist()
    return {layer: [options[option] for option in row] for layer, row in zip(layers, rows, strict=True)}


def _cheapest(table: Tensor, sizes: Tensor, price: float) -> Tensor:
    return (table + price * sizes).argmin(1)


def _kept(patterns: dict[int, list[Pattern]], context: int) -> float:
    sizes = [p.size(context) for row in patterns.values() for p in row]
    return sum(sizes) / (context * len(sizes))

"""The summary of a plan that `repr`, `print` and notebooks show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headsink.utils.format import harmless, html_table

if TYPE_CHECKING:
    from headsink.plan.plan import Plan


NO_CONTEXT = 1024  # tokens; the context of the summary if the plan names none
MOST_PATTERNS = 4  # patterns that are listed with their count
MEGABYTE = 1e6
BFLOAT16 = 2  # bytes


def summary(plan: Plan) -> dict[str, str]:
    """Return the rows of the summary: {title: text}."""
    model = plan.model
    return {
        "model": f"{harmless(model.architecture)}, {model.layers} layers, {model.kv_heads} KV heads of size {model.head_dim}, "
        f"weights {harmless(model.weights, 12)}",
        "positions": plan.positions,
        "patterns": _patterns(plan),
        "keeps": "; ".join(_keeps(plan, context) for context in contexts(plan)),
        "quality": _quality(plan),
    }


def contexts(plan: Plan) -> list[int]:
    """Return the contexts of the plan's calibration, or else of its measured quality, ascending."""
    made = plan.calibration.get("context")
    found = [n for n in made if type(n) is int and n > 0] if isinstance(made, list | tuple) else []
    return sorted(set(found or [quality.context for quality in plan.quality])) or [NO_CONTEXT]


def _patterns(plan: Plan) -> str:
    counts = list(plan.counts().items())
    found = [f"{count} x {name}" for name, count in counts[:MOST_PATTERNS]]
    if others := sum(count for _, count in counts[MOST_PATTERNS:]):
        found.append(f"{others} others")
    decoding = f"; while decoding a window of {plan.decode_window} or more" if plan.decode_window else ""
    return (", ".join(found) or "none") + f" (sink + top-k + window){decoding}"


def _keeps(plan: Plan, context: int) -> str:
    heads = [head for layer in plan.layers if layer for head in layer]
    full = 2 * len(heads) * context * plan.model.head_dim * BFLOAT16 / MEGABYTE
    kept = plan.kv_budget(context)
    return f"{kept:.1%} of the KV entries at {context} tokens, {kept * full:.1f} of {full:.1f} MB in bfloat16"


def _quality(plan: Plan) -> str:
    if not plan.quality:
        return "not measured"
    q = max(plan.quality, key=lambda quality: quality.context)
    return (
        f"KL {q.kl:.4f} nats, same top token {q.top1:.1%}, {q.right_plan} of {q.asked} answers correct "
        f"(full cache {q.right_full}) at {q.context} tokens"
    )


def as_text(plan: Plan) -> str:
    return "Plan\n" + "\n".join(f"  {name:<9} {value}" for name, value in summary(plan).items())


def as_html(plan: Plan) -> str:
    return html_table("Plan", summary(plan))

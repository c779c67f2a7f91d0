"""Results on a terminal, and as the JSON objects of `--json`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headsink.calibration.frontier import Frontier
from headsink.census.compare import Comparison
from headsink.census.first_layer import sentence
from headsink.census.head_statistics import KEPT, windows
from headsink.census.results import Census
from headsink.census.roles import EPSILON, ROLES, figures
from headsink.census.sink_tokens import drawing_tokens, secondary_tokens, stability, suggested_tau, tau_evidence
from headsink.errors import printable
from headsink.evaluation.options import CONTINUATION
from headsink.generation.generate import Generated
from headsink.plan.plan import Plan
from headsink.plan.schema import Quality
from headsink.plan.summary import contexts
from headsink.utils.format import p_value, share
from headsink.utils.terminal import MEGABYTE, new_table

NEAR = 128  # keys: how many heads make do with a window of that
SHOWN = ("sink", "first", "far")  # scores of a comparison that go on the screen; `--json` has all
MOST_PATTERNS = 10  # of a plan, that are listed one by one


def census_json(census: Census) -> dict[str, Any]:
    longest = census.lengths[-1]
    law = census.window_law()
    return {
        "settings": {key: value for key, value in census.settings.items() if key != "own_texts"},
        "roles": {length: role_counts(census, length) for length in census.lengths},
        "role_agreement": {length: float(census.role_agreement(length).mean()) for length in census.lengths},
        "windows": {length: windows_json(census, length) for length in census.lengths},
        "window_law": None if law is None else {"scale": law[0].tolist(), "exponent": law[1].tolist()},
        "drawing_tokens": drawing_tokens(census, longest),
        "secondary_tokens": secondary_tokens(census, longest),
        "secondary_stability": stability(census, longest),
        "tau": {"evidence": tau_evidence(census, longest), "suggested": suggested_tau(census, longest)},
        "first_question": {length: [t.to_dict() for t in census.first_question(length)] for length in census.lengths},
    }


def role_counts(census: Census, length: int) -> dict[str, int]:
    """How many heads have each role at one length, all texts together, most first."""
    return dict(Counter(role for layer in census.roles(length) for role in layer).most_common())


def windows_json(census: Census, length: int) -> dict[str, float]:
    """Of the KV heads: how wide a window has to be for a small error, with and without secondary sinks kept."""
    found: dict[str, float] = {}
    for kept in KEPT:
        of = figures(census.window_needed(length, heads="kv", kept=kept), NEAR, length)
        found |= {f"median_{kept}": of["median"], f"within_{NEAR}_{kept}": of["near"], f"all_{kept}": of["all"]}
    return found


def census(console: Console, census: Census) -> None:
    """Roles by length, the strongest sinks, the tokens they look at, windows, and the first question."""
    longest = census.lengths[-1]
    columns = ("tokens", *ROLES, "same role in a single text")
    table = new_table("Roles of the heads, all texts together", *columns)
    for length in census.lengths:
        counts = role_counts(census, length)
        agreement = float(census.role_agreement(length).mean())
        table.add_row(str(length), *(str(counts.get(name, 0)) for name in ROLES), f"{agreement:.0%}")
    console.print(table)

    sink, first = (census.interval(name, longest) for name in ("sink", "first"))
    at = windows(longest).index(max(w for w in windows(longest) if w <= NEAR))
    errors = census.score("errors", longest)[..., at]
    title = f"Strongest sinks at {longest} tokens; errors of first tokens + last {windows(longest)[at]}"
    table = new_table(title, "head", "sink tokens", "of it first", "error", "with secondary sinks")
    for place in sink.mean.flatten().argsort(descending=True)[:8].tolist():
        layer, head = divmod(place, sink.mean.shape[1])
        half = sink.half[layer, head]
        table.add_row(
            f"layer {layer} head {head}",
            f"{sink.mean[layer, head]:.2f}" + ("" if half.isnan() else f" ± {half:.2f}"),
            f"{first.mean[layer, head]:.2f}",
            *(f"{errors[layer, head, KEPT.index(kept)]:.4f}" for kept in KEPT),
        )
    console.print(table)

    table = new_table(
        f"Tokens that draw the attention at {longest} tokens", "token", "share of all attention", "heads", "texts"
    )
    for token in drawing_tokens(census, longest, most=8):
        name = escape(repr(token["token"])) + (" (first of the text)" if token["first"] else "")
        table.add_row(name, f"{token['share']:.1%}", str(token["heads"]), str(token["texts"]))
    console.print(table)
    found, tau = stability(census, longest), suggested_tau(census, longest)
    overlap = "" if found["overlap"] is None else f", the same tokens in two texts by {found['overlap']:.0%}"
    console.print(
        f"Floating sinks in every text: {found['heads_with']} KV heads, {found['mean_count']:.0f} a text{overlap}; tau by the "
        f"rule: {tau if tau is not None else 'none, there are no secondary sinks'} (used: {census.settings['limits']['tau']}).",
        highlight=False,
    )

    table = new_table(
        f"Window that a KV head needs for an error within {EPSILON:.0%}, secondary sinks kept",
        "tokens",
        "median",
        f"at most {NEAR}",
        "everything",
    )
    for length in census.lengths:
        needed = windows_json(census, length)
        shares = (f"{needed[name]:.0%}" for name in (f"within_{NEAR}_secondary", "all_secondary"))
        table.add_row(str(length), f"{needed['median_secondary']:.0f}", *shares)
    console.print(table)
    if (law := census.window_law()) is not None:
        low, middle, high = torch.quantile(
            law[1].flatten(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        ).tolist()
        console.print(
            f"It grows as length to the power {middle:.2f} (median over KV heads; quartiles {low:.2f} and {high:.2f}; 0 is a "
            "fixed window, 1 one that grows with the text).",
            highlight=False,
        )

    title = "The first question: is a head that is a sink in one layer also one, by number, in a later layer?"
    columns = ("tokens", "score", "sinks", "in layer 0", "from layer 0", "chance", "p", "from any layer", "chance", "p")
    table = new_table(title, *columns)
    for length in census.lengths:
        for t in census.first_question(length):
            rates = (t.rate, t.first_layer_rate, t.first_rate, t.first_chance)
            cells = [
                *(share(value) for value in rates),
                p_value(t.first_p),
                share(t.pair_rate),
                share(t.pair_chance),
                p_value(t.pair_p),
            ]
            table.add_row(str(length), t.rule, *cells)
    console.print(table)
    console.print(f"At {longest} tokens. {sentence(census.first_question(longest)[0])}", highlight=False)


def comparison(console: Console, found: Comparison) -> None:
    console.print(" and ".join(f"[bold]{escape(printable(name))}[/bold]" for name in found.names))
    if found.settings:
        console.print("They differ in: " + ", ".join(found.settings))
    else:
        console.print("They were made with the same settings.")
    columns = (
        "run",
        "tokens",
        "text",
        "score",
        "first",
        "this",
        "change",
        "most",
        "at head",
        "rank corr.",
        "beyond chance",
    )
    table = new_table(
        "Scores: means over the heads, their mean and largest change, rank correlation of the heads, share of heads whose 95 % "
        "interval of the change leaves out 0",
        *columns,
    )
    pooled = [
        view for view in found.views if view.domains == (None, None)
    ]  # where there are such, they are enough here
    for view in pooled or found.views:
        if view.score not in SHOWN:
            continue
        row = view.to_dict()
        rho, beyond = row["rank_correlation"], row["beyond_chance"]
        figures = (f"{row[name]:.3f}" for name in ("mean_a", "mean_b", "mean_difference", "largest_difference"))
        place = "{}.{}".format(*row["largest_at"])
        lengths, domains = (" / ".join(dict.fromkeys(map(str, row[name]))) for name in ("lengths", "domains"))
        cells = (place, "-" if rho is None else f"{rho:.3f}", "-" if beyond is None else f"{beyond:.0%}")
        table.add_row(escape(Path(view.run).name), lengths, escape(domains), view.score, *figures, *cells)
    console.print(table)
    if pooled:
        console.print("By kind of text: --json, or the report of --out.", style="dim", highlight=False)
    console.print(
        f"{len(found.changed)} of {found.heads} (run, length, text, head) have another role:", highlight=False
    )
    moves = Counter(f"{row['before']} to {row['after']}" for row in found.changed).most_common()
    console.print("  " + (", ".join(f"{move} {n}" for move, n in moves) or "none"), highlight=False)


def plan(console: Console, made: Plan) -> None:
    lengths, counts = contexts(made), made.counts()
    if len(counts) > MOST_PATTERNS:
        console.print(_shares(made, lengths[0]))
    else:
        table = new_table("Patterns", "first + top_k + window", "KV heads")
        for name, count in counts.items():
            table.add_row(name, str(count))
        console.print(table)
    for context in lengths:
        console.print(f"Keeps {made.kept(context):.1%} of the KV entries at {context} tokens.", highlight=False)
    if not made.quality:
        console.print("Quality was not measured.", highlight=False)
        return
    console.print(_qualities("tokens", {str(q.context): q for q in made.quality}))
    for q in made.quality:
        console.print(_bytes(made, q), highlight=False)
    console.print(f"Verified up to {made.verified} tokens.", highlight=False)


def _bytes(made: Plan, quality: Quality) -> str:
    """Why the cache's share of bytes is another one than the share of entries that a plan keeps at this length."""
    tokens, share = max(1, quality.context - CONTINUATION), quality.kv_bytes / quality.kv_bytes_full
    return (
        f"KV cache at {quality.context}: {share:.1%} of the bytes and {made.kept(tokens):.1%} of the entries after {tokens} "
        "tokens, for the rest is what is scored; bytes include bookkeeping and spare slots."
    )


def _shares(made: Plan, context: int) -> Table:
    """How many KV heads keep how much."""
    table = new_table(f"Kept at {context} tokens", "share of the keys", "KV heads")
    sizes = [head.pattern.size(context) / context for layer in made.layers for head in layer or ()]
    above = 1.0
    table.add_row("all", str(sum(size >= 1 for size in sizes)))
    for below in (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 0.0):
        if count := sum(below <= size < above for size in sizes):
            table.add_row(f"{below:.1%} to {above:.1%}" if below else f"under {above:.1%}", str(count))
        above = below
    return table


def frontier(console: Console, drawn: Frontier) -> None:
    console.print(_qualities("budget", {f"{p.calibration['budget']:.1%}": p.quality[-1] for p in drawn.plans}))
    console.print(drawn.advice(), highlight=False)


def _qualities(first: str, rows: dict[str, Quality]) -> Table:
    """Quality against the model itself, a row for each."""
    columns = (first, "KL, nats", "same top token", "nll change", "answers right", "model itself", "KV cache, MB")
    table = new_table("Against the model itself on held-out text (95 % interval)", *columns)
    for name, q in rows.items():
        kl, top1, change = q.kl_interval, q.top1_interval, q.nll_change_interval
        table.add_row(
            name,
            f"{q.kl:.4f} ({kl[0]:.4f} to {kl[1]:.4f})",
            f"{q.top1:.1%} ({top1[0]:.1%} to {top1[1]:.1%})",
            f"{q.nll_change:+.4f} ({change[0]:+.4f} to {change[1]:+.4f})",
            f"{q.right_plan} of {q.asked}",
            f"{q.right_full} of {q.asked}",
            f"{q.kv_bytes / MEGABYTE:.1f} of {q.kv_bytes_full / MEGABYTE:.1f}",
        )
    return table


def document_read(found: dict[str, Any]) -> str:
    kept = f"{found['kv_bytes'] / MEGABYTE:.1f} MB kept"
    return f"{found['prompt_tokens']} tokens read in {found['seconds']:.1f} s, {kept}: {printable(found['file'])}"


def generated_json(done: Generated) -> dict[str, Any]:
    found = {key: value for key, value in asdict(done).items() if key not in ("ids", "steps_s")}
    return found | {"token_s": done.token_s, "new_tokens": len(done.ids)}


def generated(done: Generated) -> str:
    drafted = "" if done.acceptance is None else f"; {done.acceptance:.0%} of what the plan drafted was right"
    per_token = "" if done.token_s is None else f", {1000 * done.token_s:.1f} ms per token"
    return (
        f"{done.prompt_tokens} tokens read, {len(done.ids)} written; first after {done.first_token_s:.2f} s{per_token}; "
        f"KV cache {done.kv_bytes / MEGABYTE:.1f} MB{drafted}"
    )

"""Results on a terminal, and as the JSON objects of `--json`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headsink.census import Census, Comparison
from headsink.census.transfer import sentence
from headsink.generation import Generated
from headsink.plan import Plan
from headsink.report.charts import head_rows
from headsink.report.page import p_value, role_counts, share, sink_tokens

MEGABYTE = 1e6
SHOWN = ("sink", "first", "far")  # scores of a comparison that go on the screen; `--json` has all


def census_json(census: Census) -> dict[str, Any]:
    rows = head_rows(census)
    return {
        "settings": {key: value for key, value in census.settings.items() if key != "own_texts"},
        "roles": {length: role_counts(rows, length) for length in census.lengths},
        "sink_tokens": sink_tokens(census, census.lengths[-1]),
        "first_question": {length: [t.to_dict() for t in census.first_question(length)] for length in census.lengths},
    }


def census(console: Console, census: Census) -> None:
    """Roles by length, the strongest sinks, the tokens they look at, and the first question."""
    rows, longest = head_rows(census), census.lengths[-1]
    table = _table("Roles of the heads, all texts together", "tokens", "sink", "local", "mixed", "diffuse", "retrieval")
    for length in census.lengths:
        counts = role_counts(rows, length)
        table.add_row(
            str(length), *(str(counts.get(name, 0)) for name in ("sink", "local", "mixed", "diffuse", "retrieval"))
        )
    console.print(table)

    pooled = [row for row in rows if row["length"] == longest and row["domain"] == "all texts"]
    table = _table(
        f"Strongest sinks at {longest} tokens",
        "head",
        "sink tokens",
        "of it first",
        "window error",
        "with floating sinks",
    )
    for row in sorted(pooled, key=lambda row: -row["sink"])[:8]:
        table.add_row(
            f"layer {row['layer']} head {row['head']}",
            f"{row['sink']:.2f}",
            f"{row['first']:.2f}",
            f"{row['error_first']:.4f}",
            f"{row['error_floating']:.4f}",
        )
    console.print(table)

    table = _table(f"Tokens that draw the attention at {longest} tokens", "token", "share of all attention", "heads")
    for token in sink_tokens(census, longest, most=8):
        name = escape(repr(token["token"])) + (" (first of the text)" if token["first"] else "")
        table.add_row(name, f"{token['share']:.1%}", str(token["heads"]))
    console.print(table)

    title = "The first question: is a head that is a sink in one layer also one, by number, in a later layer?"
    columns = ("tokens", "score", "sinks", "in layer 0", "from layer 0", "chance", "p", "from any layer", "chance", "p")
    table = _table(title, *columns)
    for length in census.lengths:
        for t in census.first_question(length):
            shares = (t.rate, t.first_layer_rate, t.first_rate, t.first_chance)
            cells = [
                *map(share, shares),
                p_value(t.first_p),
                share(t.pair_rate),
                share(t.pair_chance),
                p_value(t.pair_p),
            ]
            table.add_row(str(length), t.rule, *cells)
    console.print(table)
    console.print(f"At {longest} tokens. {sentence(census.first_question(longest)[0])}", highlight=False)


def comparison(console: Console, found: Comparison) -> None:
    console.print(f"[bold]{escape(found.names[0])}[/bold] and [bold]{escape(found.names[1])}[/bold]")
    if found.settings:
        console.print("They differ in: " + ", ".join(found.settings))
    else:
        console.print("They were made with the same settings.")
    columns = ("tokens", "text", "score", "first", "second", "change", "most", "at head", "rank corr.")
    table = _table(
        "Scores: means over the heads, their mean and largest change, rank correlation of the heads", *columns
    )
    for row in found.scores:
        if row["score"] not in SHOWN:
            continue
        rho = row["rank_correlation"]
        figures = (f"{row[name]:.3f}" for name in ("mean_a", "mean_b", "mean_difference", "largest_difference"))
        place = "{}.{}".format(*row["largest_at"])
        table.add_row(
            str(row["length"]), row["domain"], row["score"], *figures, place, "-" if rho is None else f"{rho:.3f}"
        )
    console.print(table)
    console.print(f"{len(found.changed)} of {found.heads} (head, length, text) have another role:", highlight=False)
    moves = Counter(f"{row['before']} to {row['after']}" for row in found.changed).most_common()
    console.print("  " + (", ".join(f"{move} {n}" for move, n in moves) or "none"), highlight=False)


def plan(console: Console, made: Plan) -> None:
    context = made.calibration.get("context")
    table = _table("Patterns", "first + floating + window", "KV heads")
    for name, count in made.counts().items():
        table.add_row(name, str(count))
    console.print(table)
    if context:
        console.print(f"Keeps {made.kept(context):.1%} of the KV entries at {context} tokens.", highlight=False)
    for quality in made.quality:
        retrieval = ", ".join(f"{r.form} {r.plan}/{r.probes} (full {r.full}/{r.probes})" for r in quality.retrieval)
        console.print(
            f"At {quality.context} tokens of held-out text: KL {quality.kl:.4f} nats, same top token {quality.top1:.1%}, nll "
            f"{quality.nll_plan:.3f} (full {quality.nll_full:.3f}); retrieval: {retrieval}; KV cache "
            f"{quality.kv_bytes / MEGABYTE:.1f} MB (full {quality.kv_bytes_full / MEGABYTE:.1f}).",
            highlight=False,
        )


def generated_json(done: Generated) -> dict[str, Any]:
    return {key: value for key, value in asdict(done).items() if key != "ids"} | {"new_tokens": len(done.ids)}


def generated(done: Generated) -> str:
    per_token = "" if done.token_s is None else f", {1000 * done.token_s:.1f} ms per token"
    return (
        f"{done.prompt_tokens} tokens read, {len(done.ids)} written; first after {done.first_token_s:.2f} s{per_token}; "
        f"KV cache {done.kv_bytes / MEGABYTE:.1f} MB"
    )


def models(console: Console, found: dict[str, Any]) -> None:
    table = _table("Built-in models", "name", "model", "licence", "installed")
    for model in found["built_in"]:
        state = f"yes, {model['bytes'] / MEGABYTE:.0f} MB" if model["installed"] else f"no; {model['install']}"
        table.add_row(model["name"], model["title"], model["licence"], state)
    console.print(table)
    console.print(f"Also: {found['others']}.", highlight=False)
    console.print(f"Tested families: {', '.join(found['tested_families'])}.", highlight=False)


def doctor(console: Console, found: dict[str, Any]) -> None:
    table = _table(None, "what", "found")
    table.add_row("python", f"{found['python']}, {found['system']}")
    for name, number in found["packages"].items():
        table.add_row(name, number or "not installed")
    table.add_row("cores, threads", f"{found['cores']}, {found['threads']}")
    table.add_row("GPUs", ", ".join(found["gpus"]) or "none")
    table.add_row(
        "built-in models", ", ".join(f"{n}: {'yes' if here else 'no'}" for n, here in found["models"].items())
    )
    table.add_row("cache folder", escape(found["cache_folder"]))
    check = found["attention"]
    verdict = "right" if check["right"] else "WRONG"
    table.add_row(
        "attention",
        f"{verdict} on {check['device']} in {check['dtype']} (largest difference {check['largest_difference']:.1e})",
    )
    console.print(table)


def _table(title: str | None, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, header_style="dim")
    return table

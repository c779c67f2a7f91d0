"""What `headsink analyze` prints of a census: the JSON object, and the tables on a terminal. Imports torch: not for the help."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headsink.census.first_layer import sentence
from headsink.census.head_statistics import KEPT, windows
from headsink.census.results import Census
from headsink.census.roles import EPSILON, ROLES, figures
from headsink.census.sink_tokens import drawing_tokens, secondary_tokens, stability, suggested_tau, tau_evidence
from headsink.utils.format import p_value, share
from headsink.utils.terminal import new_table

NEAR = 128  # keys: how many heads make do with a window of that
STRONGEST = 8  # sinks, and tokens that draw the attention, that are listed


def census_json(census: Census) -> dict[str, Any]:
    longest = census.lengths[-1]
    law = census.window_law()
    return {
        "settings": {key: value for key, value in census.settings.items() if key != "own_texts"},
        "layers": census.layers,
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
        of = figures(census.required_window(length, heads="kv", kept=kept), NEAR, length)
        found |= {f"median_{kept}": of["median"], f"within_{NEAR}_{kept}": of["near"], f"all_{kept}": of["all"]}
    return found


def print_census(console: Console, census: Census) -> None:
    """Roles by length, the strongest sinks, the tokens they look at, windows, and the first question."""
    longest = census.lengths[-1]
    console.print(_roles(census))
    console.print(_sinks(census, longest))
    console.print(_tokens(census, longest))
    console.print(_secondary(census, longest), highlight=False)
    console.print(_windows(census))
    if (law := census.window_law()) is not None:
        console.print(_growth(law[1]), highlight=False)
    console.print(_first_question(census))
    console.print(f"At {longest} tokens. {sentence(census.first_question(longest)[0])}", highlight=False)


def _roles(census: Census) -> Table:
    columns = ("tokens", *ROLES, "same role in a single text")
    table = new_table("Roles of the heads, all texts together", *columns)
    for length in census.lengths:
        counts = role_counts(census, length)
        agreement = float(census.role_agreement(length).mean())
        table.add_row(str(length), *(str(counts.get(name, 0)) for name in ROLES), f"{agreement:.0%}")
    return table


def _sinks(census: Census, length: int) -> Table:
    sink, first = (census.interval(name, length) for name in ("sink", "first"))
    at = windows(length).index(max(w for w in windows(length) if w <= NEAR))
    errors = census.score("errors", length)[..., at]
    title = f"Strongest sinks at {length} tokens; errors of initial sinks + last {windows(length)[at]}"
    table = new_table(title, "head", "sink tokens", "of it first", "error", "with secondary sinks")
    for place in sink.mean.flatten().argsort(descending=True)[:STRONGEST].tolist():
        (layer, head), at = census.place(place), divmod(place, sink.mean.shape[1])
        half = sink.half[at]
        table.add_row(
            f"layer {layer} head {head}",
            f"{sink.mean[at]:.2f}" + ("" if half.isnan() else f" ± {half:.2f}"),
            f"{first.mean[at]:.2f}",
            *(f"{errors[at][KEPT.index(kept)]:.4f}" for kept in KEPT),
        )
    return table


def _tokens(census: Census, length: int) -> Table:
    table = new_table(
        f"Tokens that draw the attention at {length} tokens", "token", "share of all attention", "heads", "texts"
    )
    for token in drawing_tokens(census, length, most=STRONGEST):
        name = escape(repr(token["token"])) + (" (first of the text)" if token["first"] else "")
        table.add_row(name, f"{token['share']:.1%}", str(token["heads"]), str(token["texts"]))
    return table


def _secondary(census: Census, length: int) -> str:
    found, tau = stability(census, length), suggested_tau(census, length)
    overlap = "" if found["overlap"] is None else f", the same tokens in two texts by {found['overlap']:.0%}"
    return (
        f"Secondary sinks in every text: {found['heads_with']} KV heads, {found['mean_count']:.0f} a text{overlap}; tau by the "
        f"rule: {tau if tau is not None else 'none, there are no secondary sinks'} (used: {census.settings['limits']['tau']})."
    )


def _windows(census: Census) -> Table:
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
    return table


def _growth(exponents: torch.Tensor) -> str:
    """How the window that a KV head needs grows with the length."""
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, middle, high = torch.quantile(exponents.flatten(), quartiles).tolist()
    return (
        f"It grows as length to the power {middle:.2f} (median over KV heads; quartiles {low:.2f} and {high:.2f}; 0 is a "
        "fixed window, 1 one that grows with the text)."
    )


def _first_question(census: Census) -> Table:
    title = "The first question: is a head that is a sink in one layer also one, by number, in a later layer?"
    layer = f"layer {census.layers[0]}"
    columns = (
        "tokens",
        "score",
        "sinks",
        f"in {layer}",
        f"from {layer}",
        "chance",
        "p",
        "from any layer",
        "chance",
        "p",
    )
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
    return table

"""Plans and peers side by side: a table (Markdown, on standard output) and a picture, from results of plans.py and peers.py.

python benchmarks/standings.py benchmarks/results/plans-smollm2.json benchmarks/results/peers-smollm2.json

Each method stands beside the model itself as measured in its own run, at the same bytes: how much the nll of text rises, how
much that of answers, and how many of the answers that the model itself gets right it gets right too. Only cases that all
runs have are counted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import altair as alt

from headsink.report.assets import write_picture
from headsink.report.charts import BLUE, CONFIG, GREY

Row = dict[str, Any]


def standings(runs: list[dict[str, Any]]) -> list[Row]:
    """A row for each method, budget and context, the best answers first."""
    common = set.intersection(*({(r["context"], r["case"]) for r in run["records"]} for run in runs))
    rows: list[Row] = []
    for run in runs:
        records = [r for r in run["records"] if (r["context"], r["case"]) in common]
        full = {_of(r): r for r in records if r["method"] == "full"}
        for method, budget, context in dict.fromkeys((r["method"], r["budget"], r["context"]) for r in records):
            mine = [r for r in records if (r["method"], r["budget"], r["context"]) == (method, budget, context)]
            if method != "full":
                rows.append({"method": method, "budget": budget, "context": context} | _row(mine, full))
    return sorted(rows, key=lambda r: (r["context"], -r["budget"], -r["answers_kept"], r["text"]))


def _of(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["context"], record["case"], record["form"]


def _row(mine: list[dict[str, Any]], full: dict[tuple[Any, ...], dict[str, Any]]) -> Row:
    pairs = [(r, full[_of(r)]) for r in mine]
    text, asked = ([p for p in pairs if (p[0]["form"] == "text") is is_text] for is_text in (True, False))
    solved = [p for p in asked if p[1]["right"]]
    return {
        "bytes": sum(r["kv_bytes"] for r in mine) / sum(r["kv_bytes_full"] for r in mine),
        "text": sum(a["nll"] - b["nll"] for a, b in text) / len(text),
        "answers": sum(a["nll"] - b["nll"] for a, b in asked) / len(asked),
        "kept": sum(a["right"] for a, _ in solved),
        "solved": len(solved),
        "answers_kept": sum(a["right"] for a, _ in solved) / max(1, len(solved)),
    }


def table(rows: list[Row]) -> str:
    lines = []
    for context, budget in dict.fromkeys((r["context"], r["budget"]) for r in rows):
        lines += [
            f"\n**{context} tokens, {budget:.1%} kept**\n",
            "| method | bytes | nll of text | nll of answers | answers kept |",
        ]
        lines.append("|---|---|---|---|---|")
        for r in (r for r in rows if (r["context"], r["budget"]) == (context, budget)):
            figures = f"{r['bytes']:.3f} | {r['text']:+.3f} | {r['answers']:+.2f} | {r['kept']} of {r['solved']}"
            name = f"**{r['method']}**" if r["method"].startswith("headsink") else r["method"]
            lines.append(f"| {name} | {figures} |")
    return "\n".join(lines)


def picture(rows: list[Row]) -> Any:
    """Answers kept over the rise of the nll of text, a panel for each context and budget; up and to the left is better."""
    ours = [
        r | {"label": r["method"] if r["method"].startswith("headsink") or r["method"] == "KVzip" else ""} for r in rows
    ]
    base = alt.Chart().encode(
        x=alt.X("text:Q", title="rise of the nll of text, nats", scale=alt.Scale(type="symlog", constant=0.02)),
        y=alt.Y("answers_kept:Q", title="answers kept", axis=alt.Axis(format="%")),
    )
    colour = alt.condition("slice(datum.method, 0, 8) == 'headsink'", alt.value(BLUE), alt.value(GREY))
    points = base.mark_point(filled=True, size=70, opacity=0.9).encode(color=colour, tooltip=["method:N"])
    names = [  # above and below, for the best lie close together
        base.mark_text(dx=8, dy=dy, align="left").encode(text="label:N").transform_filter(which)
        for dy, which in ((-8, "datum.label != 'KVzip'"), (10, "datum.label == 'KVzip'"))
    ]
    layered = alt.layer(points, *names, data=alt.Data(values=ours)).properties(width=240, height=180)
    kept = alt.Header(title=None, labelExpr="format(datum.value, '.1%') + ' kept'")
    tokens = alt.Header(title=None, labelExpr="format(datum.value, ',') + ' tokens'")
    return layered.facet(
        column=alt.Column("budget:O", sort="descending", header=kept), row=alt.Row("context:O", header=tokens)
    ).resolve_scale(x="independent")


def bars(rows: list[Row]) -> Any:
    """A bar for each method, for few budgets and many names: the rise of the nll of text, and answers kept."""
    several = len({r["budget"] for r in rows}) > 1
    rows = [
        r | {"place": n, "name": f"{r['method']} ({r['budget']:.1%})" if several else r["method"]}
        for n, r in enumerate(rows)
    ]
    colour = alt.condition("slice(datum.method, 0, 8) == 'headsink'", alt.value(BLUE), alt.value(GREY))
    names = alt.Y("name:N", sort=alt.EncodingSortField("place"), title=None, axis=alt.Axis(labelLimit=260))
    base = alt.Chart(alt.Data(values=rows)).mark_bar().encode(color=colour, y=names).properties(width=240)
    bare = names.copy()
    bare.axis = None
    return alt.hconcat(
        base.encode(x=alt.X("answers_kept:Q", title="answers kept", axis=alt.Axis(format="%"))),
        base.encode(x=alt.X("text:Q", title="rise of the nll of text, nats"), y=bare),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--picture", type=Path, help="writes PICTURE.png and PICTURE.svg")
    parser.add_argument("--bars", action="store_true", help="the picture is of bars with every name")
    arguments = parser.parse_args()
    rows = standings([json.loads(path.read_text(encoding="utf-8")) for path in arguments.results])
    print(table(rows))
    if arguments.picture is not None:
        write_picture(
            arguments.picture, (bars if arguments.bars else picture)(rows).configure(**CONFIG).to_dict(validate=False)
        )


if __name__ == "__main__":
    main()

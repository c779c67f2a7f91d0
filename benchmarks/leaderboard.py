"""Compare headsink's plans with kvpress's presses, from results of plans.py and peers.py: a table, a picture, a page.

python benchmarks/leaderboard.py --page docs/leaderboard.md
python benchmarks/leaderboard.py benchmarks/results/plans-smollm2-default.json benchmarks/results/peers-smollm2.json

Each method is compared with the full cache of its own run. Retrieval accuracy counts the answers that the full cache gets right
and the method gets right too; delta NLL is in nats per token. Only cases that all runs have are counted.
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
RESULTS = Path(__file__).parent / "results"
BUDGETS = (0.5, 0.25, 0.125)  # of the page; presses were not run below
NAMES = {  # methods in records without a schema, which are older: most of them are in plans.py no more
    "headsink": "headsink, online eviction",
    "headsink, once": "headsink, prefill compression",
    "headsink, retold": "headsink, reconstruction",
    "retold, values as they are": "reconstruction without value refitting",
    "retold, equal numbers": "reconstruction with equal head budgets",
    "retold, numbers by need only": "reconstruction with budgets by importance only",
    "squared errors, not slopes": "squared errors in place of loss gradients",
    "without a start by need": "without a start from importance",
    "without swaps": "without local search",
    "without questions": "without needles",
    "without floating keys": "without top-k keys",
    "one number of floating keys": "one number of top-k keys",
}
SECTIONS = [  # title, note, and the runs of each table
    (
        "SmolLM2-135M, float32",
        "",
        [
            ["plans-smollm2-default", "plans-smollm2-reconstruction", "peers-smollm2"],
            ["plans-smollm2-6000", "peers-smollm2"],
        ],
    ),
    (
        "SmolLM2-135M, bfloat16",
        "No press was run at 6,000 tokens.",
        [
            ["plans-smollm2-bfloat16", "peers-smollm2-bfloat16"],
            ["plans-smollm2-6000-bfloat16-default", "plans-smollm2-6000-bfloat16"],
        ],
    ),
    (
        "Gemma 3 270M, float32, three global layers",
        "KVzip and DuoAttention of kvpress refuse this model.",
        [["plans-gemma3", "peers-gemma3"], ["plans-gemma3-6000", "peers-gemma3"]],
    ),
]
OPENING = """# Leaderboard

Made by `python benchmarks/leaderboard.py --page docs/leaderboard.md`. Do not edit.

Look up here how headsink compares with sixteen presses of kvpress 0.5.5 at the same KV budget. [Calibration](calibration.md)
says how it was measured. headsink's rows with Gemma 3 were measured before a head kept a synthetic key ([how it
works](how-it-works.md#refitting)).

Each cell has retrieval accuracy (of the answers that the full cache gets right), delta NLL of the text, delta NLL of the
answers (nats per token, lower is better), and cached bytes relative to the full cache. Rows are sorted by mean retrieval
accuracy over the budgets that a method can reach, then by mean delta NLL of the text."""


def leaderboard(runs: list[dict[str, Any]]) -> list[Row]:
    """A row for each method, budget and context, the best answers first."""
    common = set.intersection(*({(r["context"], r["case"]) for r in run["records"]} for run in runs))
    rows: list[Row] = []
    for run in runs:
        records = [r for r in run["records"] if (r["context"], r["case"]) in common]
        full = {_of(r): r for r in records if r["method"] == "full"}
        for method, budget, context in dict.fromkeys((r["method"], r["budget"], r["context"]) for r in records):
            mine = [r for r in records if (r["method"], r["budget"], r["context"]) == (method, budget, context)]
            if method != "full":
                name = method if "schema" in run else NAMES.get(method, method)
                rows.append({"method": name, "budget": budget, "context": context} | _row(mine, full))
    return sorted(rows, key=lambda r: (r["context"], -r["budget"], -r["accuracy"], r["text"]))


def _of(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["context"], record["case"], record["form"]


def _row(mine: list[dict[str, Any]], full: dict[tuple[Any, ...], dict[str, Any]]) -> Row:
    pairs = [(r, full[_of(r)]) for r in mine]
    text, answers = ([p for p in pairs if (p[0]["form"] == "text") is is_text] for is_text in (True, False))
    solved = [p for p in answers if p[1]["right"]]
    correct = sum(a["right"] for a, _ in solved)
    return {
        "documents": len({r["case"] for r in mine}),
        "bytes": sum(r["kv_bytes"] for r in mine) / sum(r["kv_bytes_full"] for r in mine),
        "text": sum(a["nll"] - b["nll"] for a, b in text) / len(text),
        "answers": sum(a["nll"] - b["nll"] for a, b in answers) / len(answers),
        "correct": correct,
        "correct_full": len(solved),
        "accuracy": correct / max(1, len(solved)),
    }


def table(rows: list[Row]) -> str:
    """A table for each context: a line for each method, a column for each budget."""
    parts = []
    for context in dict.fromkeys(r["context"] for r in rows):
        here = [r for r in rows if r["context"] == context]
        budgets = sorted({r["budget"] for r in here}, reverse=True)
        methods: dict[str, dict[float, Row]] = {}
        for r in here:
            methods.setdefault(r["method"], {})[r["budget"]] = r
        lines = [
            f"**{context:,} tokens, {here[0]['documents']} documents**\n",
            f"| method | {' | '.join(f'{budget:.1%}' for budget in budgets)} |",
            f"|---|{'---|' * len(budgets)}",
        ]
        for method, cells in sorted(methods.items(), key=lambda item: _rank(list(item[1].values()))):
            name = f"**{method}**" if method.startswith("headsink") else method
            none = "not measured" if method.startswith("headsink") else "not possible"
            lines.append(f"| {name} | {' | '.join(_cell(cells.get(budget), none) for budget in budgets)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _rank(rows: list[Row]) -> tuple[float, float]:
    return -sum(r["accuracy"] for r in rows) / len(rows), sum(r["text"] for r in rows) / len(rows)


def _cell(row: Row | None, none: str) -> str:
    if row is None:
        return none
    accuracy = f"{row['correct']}/{row['correct_full']}"
    return f"{accuracy}<br>{row['text']:+.3f}<br>{row['answers']:+.2f}<br>{row['bytes']:.3f}"


def page() -> str:
    """The page of all tables, from the committed results."""
    parts = [OPENING]
    for title, note, tables in SECTIONS:
        parts.append(f"## {title}")
        parts += [note] if note else []
        for names in tables:
            rows = leaderboard([_read(RESULTS / f"{name}.json") for name in names])
            parts.append(table([row for row in rows if row["budget"] in BUDGETS]))
            links = ", ".join(f"[{name}.json](../benchmarks/results/{name}.json)" for name in names)
            parts.append(f"From {links}.")
    return "\n\n".join(parts) + "\n"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def picture(rows: list[Row]) -> Any:
    """Retrieval accuracy against delta NLL of the text, a panel for each context and budget; up and to the left is better."""
    ours = [
        r | {"label": r["method"] if r["method"].startswith("headsink") or r["method"] == "KVzip" else ""} for r in rows
    ]
    base = alt.Chart().encode(
        x=alt.X("text:Q", title="delta NLL of the text, nats per token", scale=alt.Scale(type="symlog", constant=0.02)),
        y=alt.Y("accuracy:Q", title="retrieval accuracy", axis=alt.Axis(format="%")),
    )
    colour = alt.condition("slice(datum.method, 0, 8) == 'headsink'", alt.value(BLUE), alt.value(GREY))
    points = base.mark_point(filled=True, size=70, opacity=0.9).encode(color=colour, tooltip=["method:N"])
    names = [  # above and below, as the best are close together
        base.mark_text(dx=8, dy=dy, align="left").encode(text="label:N").transform_filter(which)
        for dy, which in ((-8, "datum.label != 'KVzip'"), (10, "datum.label == 'KVzip'"))
    ]
    layered = alt.layer(points, *names, data=alt.Data(values=ours)).properties(width=240, height=180)
    budget = alt.Header(title=None, labelExpr="'KV budget ' + format(datum.value, '.1%')")
    tokens = alt.Header(title=None, labelExpr="format(datum.value, ',') + ' tokens'")
    return layered.facet(
        column=alt.Column("budget:O", sort="descending", header=budget), row=alt.Row("context:O", header=tokens)
    ).resolve_scale(x="independent")


def bars(rows: list[Row]) -> Any:
    """A bar for each method, for few budgets and many names: retrieval accuracy and delta NLL of the text."""
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
        base.encode(x=alt.X("accuracy:Q", title="retrieval accuracy", axis=alt.Axis(format="%"))),
        base.encode(x=alt.X("text:Q", title="delta NLL of the text, nats per token"), y=bare),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--page", type=Path, help="write all tables of the committed results here")
    parser.add_argument("--picture", type=Path, help="write PICTURE.png and PICTURE.svg")
    parser.add_argument("--bars", action="store_true", help="draw a bar for each method")
    arguments = parser.parse_args()
    if arguments.page is not None:
        arguments.page.write_text(page(), encoding="utf-8")
    if not arguments.results:
        return
    rows = leaderboard([_read(path) for path in arguments.results])
    print(table(rows))
    if arguments.picture is not None:
        write_picture(
            arguments.picture, (bars if arguments.bars else picture)(rows).configure(**CONFIG).to_dict(validate=False)
        )


if __name__ == "__main__":
    main()

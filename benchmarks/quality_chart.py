r"""Quality against KV budget: a picture of plans and kvpress presses, from results of plans.py and peers.py.

python benchmarks/quality_chart.py benchmarks/results/{plans-smollm2-default,plans-smollm2-reconstruction,peers-smollm2}.json \
    --picture docs/pictures/quality

Two panels: retrieval accuracy relative to the full cache, and the delta NLL per token of text. headsink and the best peers have a
colour; every other press is a thin grey line. The numbers are those of leaderboard.py, on the cases that all results have.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import altair as alt
from leaderboard import Row, leaderboard

from headsink.report.assets import write_picture
from headsink.report.charts import BLUE, CONFIG, GREEN, GREY, ORANGE, SKY, VERMILION

CONTEXT = 2000  # tokens, of the results that are drawn
COLOURS = {"headsink": BLUE, "KVzip": VERMILION, "DuoAttention": ORANGE, "Compactor": GREEN, "StreamingLLM": SKY}
OTHERS = "the other presses"
PANEL: dict[str, Any] = {"width": 310, "height": 230}


def rows_of(found: list[Row], context: int) -> list[dict[str, Any]]:
    """A row for each method and budget; every method starts at the full cache, which costs nothing."""
    rows = []
    for method in dict.fromkeys(row["method"] for row in found):
        name = "headsink" if method.startswith("headsink") else method
        label = {"method": method, "name": name if name in COLOURS else OTHERS}
        rows.append(label | {"budget": 1.0, "accuracy": 1.0, "nll": 0.0})
        rows += [
            label | {"budget": row["budget"], "accuracy": row["accuracy"], "nll": row["text"]}
            for row in found
            if (row["method"], row["context"]) == (method, context)
        ]
    return rows


def picture(rows: list[dict[str, Any]]) -> Any:
    """Retrieval accuracy and delta NLL against the KV budget, which falls to the right."""
    names = [*COLOURS, OTHERS]
    colours = alt.Scale(domain=names, range=[*COLOURS.values(), GREY])
    legend = alt.Legend(orient="bottom", columns=6, title=None, symbolStrokeWidth=3, labelLimit=300)
    budgets = sorted({row["budget"] for row in rows})

    def panel(title: str, y: alt.Y) -> alt.LayerChart:
        base = alt.Chart().encode(
            x=alt.X(
                "budget:Q",
                title="KV budget (share of the full cache)",
                scale=alt.Scale(type="log", base=2, domain=[budgets[0] * 0.94, 1.06], reverse=True, nice=False),
                axis=alt.Axis(values=budgets, format=".3~%", grid=False),
            ),
            y=y,
            detail="method:N",
            color=alt.Color("name:N", scale=colours, sort=names, legend=legend),
        )
        others, best = (base.transform_filter(f"datum.name {sign} '{OTHERS}'") for sign in ("===", "!=="))
        ours = base.transform_filter("datum.name === 'headsink'")
        return alt.layer(
            others.mark_line(strokeWidth=1),
            best.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=40, filled=True)),
            ours.mark_line(strokeWidth=3.5, point=alt.OverlayMarkDef(size=80, filled=True)),
        ).properties(title=title, **PANEL)

    accuracy = alt.Y("accuracy:Q", title=None, scale=alt.Scale(domain=[0, 1.02], nice=False), axis=alt.Axis(format="%"))
    nll = alt.Y(
        "nll:Q",
        title=None,
        scale=alt.Scale(type="symlog", constant=0.02, domain=[0.6, -0.004], nice=False),
        axis=alt.Axis(values=[0, 0.01, 0.03, 0.1, 0.3, 0.6], labelExpr="datum.value ? format(datum.value, '+') : '0'"),
    )
    both = alt.hconcat(
        panel("Retrieval accuracy, relative to the full cache (up is better)", accuracy),
        panel("Delta NLL of text, nats per token (up is better)", nll),
        data=alt.Data(values=rows),
        spacing=36,
    )
    return both.configure(**CONFIG, background="white", padding=12).to_dict(validate=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="from plans.py and peers.py")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of the cases to draw")
    parser.add_argument("--picture", type=Path, required=True, help="writes PICTURE.png and PICTURE.svg")
    arguments = parser.parse_args()
    found = leaderboard([json.loads(path.read_text(encoding="utf-8")) for path in arguments.results])
    write_picture(arguments.picture, picture(rows_of(found, arguments.context)))


if __name__ == "__main__":
    main()

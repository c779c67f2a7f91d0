"""Speed against context: a Markdown table and a picture, from results of `headsink bench speed`.

python benchmarks/speed_chart.py benchmarks/results/speed-smollm2.json --picture docs/pictures/speed
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import altair as alt

from headsink.report.assets import write_picture
from headsink.report.charts import CONFIG


def table(results: list[dict[str, Any]]) -> str:
    """A row for each context and way: medians, with (minimum–maximum)."""
    lines = ["| context | | TPOT ratio | TPOT, ms | TTFT ratio | TTFT, s | KV cache |", "|---|---|---|---|---|---|---|"]
    for row in results:
        decode, prefill = row["decode_s"], row["prefill_s"]
        name = f"**{row['way']}**" if row["way"].startswith("headsink") else row["way"]
        lines.append(
            f"| {row['context']:,} | {name} "
            f"| {row['decode_ratio']['median']:.2f} "
            f"| {1e3 * decode['median']:.1f} ({1e3 * decode['min']:.1f}–{1e3 * decode['max']:.1f}) "
            f"| {row['prefill_ratio']['median']:.2f} "
            f"| {prefill['median']:.2f} ({prefill['min']:.2f}–{prefill['max']:.2f}) "
            f"| {row['kv_ratio']:.3f}, {row['kv_bytes'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def picture(results: list[dict[str, Any]]) -> Any:
    """TPOT and TTFT against the context."""
    rows = [
        {"context": row["context"], "way": row["way"]}
        | {"decode": 1e3 * row["decode_s"]["median"], "prefill": row["prefill_s"]["median"]}
        for row in results
    ]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    base = alt.Chart(alt.Data(values=rows)).mark_line(point=True).properties(width=300, height=220)
    base = base.encode(
        x=alt.X("context:Q", title="context, tokens"),
        color=alt.Color("way:N", sort=ways, title=None, legend=alt.Legend(orient="bottom", columns=2, labelLimit=300)),
    )
    both = alt.hconcat(
        base.encode(y=alt.Y("decode:Q", title="TPOT, ms")),
        base.encode(y=alt.Y("prefill:Q", title="TTFT, s")),
    )
    return both.configure(**CONFIG).to_dict(validate=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="from headsink bench speed --out")
    parser.add_argument("--picture", type=Path, help="write PICTURE.png and PICTURE.svg")
    arguments = parser.parse_args()
    found = json.loads(arguments.results.read_text(encoding="utf-8"))
    print(table(found["results"]))
    if arguments.picture is not None:
        write_picture(arguments.picture, picture(found["results"]))


if __name__ == "__main__":
    main()

"""docs/results.md from the rows of `headsink bench all`, and from nothing else: tables, a few pictures, and where it is worse.

Every line of a table names its row, which is a JSON file with the command that measures it. What stands under "Where it is slower
or worse" is chosen from the same rows by rule (worse.py).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from headsink.bench.suite import pictures
from headsink.bench.suite.records import file_of, read_rows
from headsink.bench.suite.regressions import worse
from headsink.bench.suite.summary import plans, summary
from headsink.bench.suite.tables import Link, Record, named, of_kind, ranged, relative, sure, table, values
from headsink.errors import HeadsinkError
from headsink.report.assets import write_picture
from headsink.utils.files import check_file, read_text, write_text

SERVING = "serving-smollm2.json"  # beside the folder of rows, from benchmarks/serving.py


def write(folder: Path, out: Path, force: bool = False) -> Path:
    """Write the page, and its pictures into pictures/ beside it."""
    done = read_rows(folder)
    if not any("found" in row for row in done.values()):
        raise HeadsinkError(f"{folder}: no row in it was measured; headsink bench all --out {folder} does that")
    check_file(out, force)
    drawn = pictures.drawn(done)
    text = page(folder, done, out, list(drawn))
    for name, spec in drawn.items():
        (out.parent / "pictures").mkdir(parents=True, exist_ok=True)
        write_picture(out.parent / "pictures" / f"results-{name}", spec)
    return write_text(out, text, force)


def page(folder: Path, done: dict[str, Record], out: Path, drawn: list[str]) -> str:
    """The page as Markdown, for a file `out`. drawn: the pictures that there are."""
    place, file = out.parent, folder.parent / SERVING
    served = json.loads(read_text(file)) if file.is_file() else {}
    served_link = f"[{file.name}]({relative(file, place)})"

    def link(name: str) -> str:
        return f"[{name}]({relative(file_of(folder, name), place)})"

    found = {name: row for name, row in done.items() if "found" in row}
    parts = [
        "# Results",
        f"Made by `headsink bench results {relative(folder, Path.cwd())} --out {relative(out, Path.cwd())}` from the rows of "
        "`headsink bench all`; change nothing here by hand. Every line names its row: a JSON file, whose command is at the end. "
        "Medians stand with the least and the most, other figures with intervals of 95 %.",
        *machines(found),
        "## In short",
        *summary(found, link),
        "## The plans",
        *plans(found, link),
        "## What it costs",
        *quality(found, link),
        *shown(drawn, "quality"),
        "## Agreement with the model itself",
        *agreement(found, link),
        *shown(drawn, "agreement"),
        "## Speed",
        *speed(found, link),
        *shown(drawn, "speed"),
        "## Memory",
        *memory(found, link),
        "## Serving",
        *serving(served, served_link),
        "## Are specialised prompts different?",
        *families(found, link),
        "## Where it is slower or worse",
        *worse(found, link, served, served_link),
        "## What was not measured",
        *missing(done, link),
        "## Rows and commands",
        *commands(done, link),
    ]
    return "\n\n".join(parts) + "\n"


def shown(drawn: list[str], kind: str) -> list[str]:
    return [f"![{name}](pictures/results-{name}.png)" for name in drawn if name.startswith(kind)]


def machines(found: dict[str, Record]) -> list[str]:
    """On what, and with which versions; once for all rows of one kind."""
    told: dict[str, list[str]] = {}
    for name, row in found.items():
        on, versions = row["machine"], row["versions"]
        memory = f", {on['memory_bytes'] / 2**30:.0f} GiB" if on.get("memory_bytes") else ""
        packages = ", ".join(f"{package} {number}" for package, number in versions.items() if number)
        text = f"{on['cpu']}, {on['cores']} cores, {on['threads']} threads{memory}; {packages}"
        kinds = told.setdefault(text, [])
        if (kind := name.split("/")[0]) not in kinds:
            kinds.append(kind)
    return [f"Machine ({', '.join(kinds)}): {text}." for text, kinds in told.items()]


def quality(found: dict[str, Record], link: Link) -> list[str]:
    """A line for each task and model: the score of the model itself, and under every plan with its change."""
    parts = []
    for model, tasks in of_kind(found, "quality").items():
        kept = list(dict.fromkeys(way["way"] for row in tasks.values() for way in row["found"]["ways"]))
        lines = []
        for row in tasks.values():
            one = row["found"]
            ways = {way["way"]: way for way in one["ways"]}
            better = "higher" if one["higher_is_better"] else "lower"
            prompts = one["prompt_tokens"]
            lines.append(
                [one["task"], f"{one['metric']}, {better} is better"]
                + [_score(ways[way]) if way in ways else "" for way in kept]
                + [f"{one['items']} of {prompts['median']:,.0f} tokens ({prompts['min']:,} to {prompts['max']:,})"]
                + [link(row["row"])]
            )
        columns = ["task", "metric", *(way if way == "full" else f"{float(way):.1%} planned" for way in kept)]
        parts += [f"**{model}**", table([*columns, "prompts", "row"], lines)]
    said = (
        "Under a plan: the score; its change, on the same prompts; and the bytes of the KV cache that were held in the end, of "
        "the model's own. Of a model with layers that slide by themselves these are in it, as they are in the model's own."
    )
    return [said, *parts] if parts else ["Not measured yet."]


def _score(way: Record) -> str:
    if "change" not in way:
        return sure(way, "score", ".3f")
    return f"{way['score']:.3f}; {sure(way, 'change', '+.3f')}; keeps {way['kept']:.1%}"


def agreement(found: dict[str, Record], link: Link) -> list[str]:
    parts = []
    for model, tasks in of_kind(found, "quality").items():
        lines = [
            [
                *(row["found"]["task"], f"{float(way['way']):.1%}", f"{way['kept']:.1%}"),
                *(sure(way, "kl", ".4f"), sure(way, "same_tokens", ".1%"), sure(way, "same_output", ".1%")),
                link(row["row"]),
            ]
            for row in tasks.values()
            for way in row["found"]["ways"]
            if "change" in way
        ]
        heads = ["task", "budget", "kept", "KL, nats a token", "same tokens", "whole outputs the same", "row"]
        parts += [f"**{model}**", table(heads, lines)]
    return parts or ["Not measured yet."]


def speed(found: dict[str, Record], link: Link) -> list[str]:
    """Lines as in docs/performance.md."""
    parts = []
    for model, cases in of_kind(found, "speed").items():
        lines = [
            [
                *(f"{one['context']:,}", str(one["batch"]), named(one["way"])),
                *(ranged(one["decode_s"], 1e3), f"{one['decode_ratio']['median']:.2f}"),
                *(ranged(one["prefill_s"], 1, 2), f"{one['prefill_ratio']['median']:.2f}"),
                link(row["row"]),
            ]
            for row in _in_order(cases)
            for one in row["found"]["results"]
        ]
        heads = ["tokens", "texts", "", "ms a token of every text", "ratio", "first token, s", "ratio", "row"]
        parts += [f"**{model}**, {_dtypes(cases)}; ratios are to transformers, above 1 is faster", table(heads, lines)]
    return parts or ["Not measured yet."]


def memory(found: dict[str, Record], link: Link) -> list[str]:
    parts = []
    for model, cases in of_kind(found, "memory").items():
        lines = []
        for row in _in_order(cases):
            for one in row["found"]["results"]:
                kv = (
                    ["not told", ""]
                    if one["kv_bytes"] is None
                    else [f"{one['kv_bytes'] / 1e6:.1f}", f"{one['kv_ratio']:.3f}"]
                )
                peak = one["peak_bytes"]
                process = (
                    ["not told", ""] if peak is None else [ranged(peak, 1e-6, 0), f"{one['peak_ratio']['median']:.3f}"]
                )
                case = [f"{one['context']:,}", str(one["batch"]), named(one["way"])]
                lines.append([*case, *kv, *process, link(row["row"])])
        heads = ["tokens", "texts", "", "KV cache, MB", "ratio", "peak of the process, MB", "ratio", "row"]
        parts += [f"**{model}**, {_dtypes(cases)}; ratios are to transformers, below 1 is less", table(heads, lines)]
    return parts or ["Not measured yet."]


def _in_order(cases: dict[str, Record]) -> list[Record]:
    return sorted(cases.values(), key=lambda row: (row["settings"]["batches"], row["settings"]["contexts"]))


def _dtypes(cases: dict[str, Record]) -> str:
    return ", ".join(dict.fromkeys(row["found"]["dtype"] for row in cases.values()))


def serving(found: Record, link: str) -> list[str]:
    """Whatever benchmarks/serving.py measured of each way, and its ratios."""
    if not found:
        return ["Not measured yet."]
    ways: dict[str, dict[str, list[float]]] = {}
    for one in found.get("rounds", []):
        for name, value in _numbers(one):
            if name != "round":
                ways.setdefault(one["way"], {}).setdefault(name, []).append(value)
    names = list(dict.fromkeys(name for way in ways.values() for name in way))

    def short(value: float) -> str:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

    def cell(values: list[float]) -> str:
        return f"{short(statistics.median(values))} ({short(min(values))} to {short(max(values))})" if values else ""

    lines = [[name, *(cell(way.get(name, [])) for way in ways.values())] for name in names]
    ratios = [
        f"- {name.replace('_', ' ')}: {cell(values(value))}" for name, value in found.items() if name.endswith("_ratio")
    ]
    return [
        f"{link}, `{found.get('command', '')}`",
        *([table(["", *ways], lines)] if lines else []),
        *(["Plan to stock:", "\n".join(ratios)] if ratios else []),
    ]


def _numbers(one: Record, before: str = "") -> Iterator[tuple[str, float]]:
    for name, value in one.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{before}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{before}{name}", float(value)


def families(found: dict[str, Record], link: Link) -> list[str]:
    """Plans made on one kind of text, run on every kind; and what two kinds differ in beside two halves of one."""
    parts = []
    for model, cases in of_kind(found, "families").items():
        for row in cases.values():
            one = row["found"]
            cells: dict[str, list[str]] = {}
            for cell in one["cells"]:
                answers = f"{cell['right']} of {cell['right_full']}"
                cells.setdefault(cell["calibrated_on"], []).append(f"{sure(cell, 'kl', '.4f')}; {answers}")
            tested = [f"on {kind}" for kind in dict.fromkeys(cell["tested_on"] for cell in one["cells"])]
            lines = [[made, *tests, link(row["row"])] for made, tests in cells.items()]
            noise = ", ".join(f"{each['tested_on']} {sure(each, 'kl', '+.4f')}" for each in one["noise"])
            parts += [
                f"**{model}**, {one['context']:,} tokens, plans of {one['budget']:.1%}: KL of text in nats a token, and answers "
                "right of those that the model itself gets right, plans of two seeds together",
                table(["plan made on", *tested, "row"], lines),
                f"- Another family's plan costs {sure(one['own'], 'kl', '+.4f')} beyond a family's own (below 0: its own is the "
                f"worse one); two plans of one family, of different seeds, differ by: {noise}.\n"
                + "\n".join(_differences(one, same, what) for same, what in ((True, "one family"), (False, "two"))),
            ]
    return parts or ["Not measured yet."]


def _differences(found: Record, same: bool, what: str) -> str:
    """What two halves of the texts of one family differ in, or of two; and their plans."""
    pairs = [pair for pair in found["census"]["pairs"] if (pair["families"][0] == pair["families"][1]) is same]
    plans = [pair["moved"] for pair in found["agreement"] if (pair["plans"][0] == pair["plans"][1]) is same]
    far = [pair["scores"]["far"]["beyond_chance"] for pair in pairs]
    roles = [pair["other_role"] for pair in pairs]
    return (
        f"- Between texts of {what}, {statistics.mean(far):.1%} of the heads differ in attention to what is far and "
        f"{statistics.mean(roles):.1%} in role; between plans, {statistics.mean(plans):.1%} of the keys go to other heads."
    )


def missing(done: dict[str, Record], link: Link) -> list[str]:
    lines = [f"- {link(name)}: {row['missing']}" for name, row in done.items() if "missing" in row]
    peers: dict[str, list[str]] = {}
    for name, row in done.items():
        for peer in row.get("found", {}).get("peers", []):
            if "missing" in peer:
                install = f" ({peer['install']})" if "install" in peer else ""
                peers.setdefault(f"{peer['peer']}: {peer['missing']}{install}", []).append(link(name))
    lines += [f"- {reason}, in {', '.join(names)}" for reason, names in peers.items()]
    return ["\n".join(lines) if lines else "Everything that was asked for was measured."]


def commands(done: dict[str, Record], link: Link) -> list[str]:
    lines = [
        [
            link(name),
            f"`{row['command']}`",
            row["date"],
            _took(row),
        ]
        for name, row in done.items()
    ]
    said = (
        "DIR is the folder of the rows; LLAMA-CPP and VLLM are where these are installed. `headsink bench again DIR ROW` "
        "measures a row again and compares every figure with the one that stands here."
    )
    return [said, table(["row", "command", "date", "took"], lines)]


def _took(row: Record) -> str:
    if "seconds" not in row:
        return "not measured"
    return f"{row['seconds']:,.0f} s" + (" since it was stopped last" if "resumed" in row else "")

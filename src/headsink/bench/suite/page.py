"""Write docs/results.md from the rows of `headsink bench all`: tables, a few pictures, and a list of where headsink is worse.

Every line of a table links to its row, a JSON file with the command that measures it. "Where it is slower or worse" is selected
from the same rows by rule (regressions.py).
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from headsink.bench.serving import HEADS, cells, compared
from headsink.bench.suite import pictures
from headsink.bench.suite.records import file_of, read_rows
from headsink.bench.suite.regressions import find_regressions
from headsink.bench.suite.summary import plans, summary
from headsink.bench.tables import (
    NOT_MEASURED,
    UNKNOWN,
    Link,
    Record,
    budget_name,
    emphasize,
    format_range,
    hardware,
    of_kind,
    relative,
    sure,
    table,
)
from headsink.errors import HeadsinkError
from headsink.report.assets import write_picture
from headsink.utils.files import check_file, read_text, write_text

COMMAND = "headsink bench all --out DIR --only"
SERVING = "serving-smollm2.json"  # next to the folder of rows, from `headsink bench serving`


def write(folder: Path, out: Path, force: bool = False) -> Path:
    """Write the page, and its pictures into pictures/ next to it."""
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
    """The page as Markdown, for a file `out`. drawn: names of the pictures."""
    place, file = out.parent, folder.parent / SERVING
    served = json.loads(read_text(file)) if file.is_file() else {}
    served_link = f"[{file.name}]({relative(file, place)})"

    def link(name: str, text: str = "") -> str:
        return f"[{text or name}]({relative(file_of(folder, name), place)})"

    found = {name: row for name, row in done.items() if "found" in row}
    parts = [
        "# Results",
        f"Made by `headsink bench results {relative(folder, Path.cwd())} --out {relative(out, Path.cwd())}` from the rows of "
        "`headsink bench all`. Do not edit.",
        "Look up here what a plan costs on common tasks, how its speed and memory compare with transformers, llama.cpp and vLLM, "
        "and where headsink is slower or worse. Every line links to its row, a JSON file. Medians stand with (minimum–maximum), "
        "other figures with [95 % interval].",
        *machines(found),
        "## In short",
        *summary(found, link),
        "## Plans",
        *plans(found, link),
        "## What a plan costs",
        *quality(found, link),
        *picture_links(drawn, "quality"),
        "## Long-context suites",
        *suites(found, link),
        "## Agreement with the full cache",
        *agreement(found, link),
        *picture_links(drawn, "agreement"),
        "## Speed",
        *speed(found, link),
        *picture_links(drawn, "speed"),
        "## Memory",
        *memory(found, link),
        "## Serving",
        *serving(served, served_link),
        "## Are specialised prompts different?",
        *domains(found, link),
        "## Where it is slower or worse",
        *find_regressions(found, link, served, served_link),
        "## What was not measured",
        *missing_section(done, link),
        "## Rows and commands",
        *commands(done, link),
    ]
    return "\n\n".join(parts) + "\n"


def picture_links(drawn: list[str], kind: str) -> list[str]:
    return [f"![{name}](pictures/results-{name}.png)" for name in drawn if name.startswith(kind)]


def machines(found: dict[str, Record]) -> list[str]:
    """Hardware and versions, once for all kinds of rows that share them."""
    kinds: dict[str, list[str]] = {}
    for name, row in found.items():
        on, versions = row["machine"], row["versions"]
        memory = f", {on['memory_bytes'] / 2**30:.0f} GiB" if on.get("memory_bytes") else ""
        packages = ", ".join(f"{package} {number}" for package, number in versions.items() if number)
        text = f"{hardware(on)}{memory}; {packages}"
        kind = name.split("/")[0]
        if kind not in kinds.setdefault(text, []):
            kinds[text].append(kind)
    return [f"Machine ({', '.join(names)}): {text}." for text, names in kinds.items()]


def quality(found: dict[str, Record], link: Link) -> list[str]:
    """A line for each task and model: the score with the full cache, and under every plan with its change."""
    parts = []
    for model, tasks in of_kind(found, "quality").items():
        names = list(dict.fromkeys(way["way"] for row in tasks.values() for way in row["found"]["ways"]))
        lines = []
        for row in tasks.values():
            one = row["found"]
            ways = {way["way"]: way for way in one["ways"]}
            prompts = one["prompt_tokens"]
            lines.append(
                [link(row["row"], one["task"]), f"{one['metric']} {'↑' if one['higher_is_better'] else '↓'}"]
                + [_score(ways[name]) if name in ways else "" for name in names]
                + [f"{one['items']}<br>{prompts['median']:,.0f} ({prompts['min']:,}–{prompts['max']:,})"]
            )
        columns = ["task", "metric", *map(_column, names)]
        parts += [f"**{model}**", table([*columns, "prompts, tokens"], lines)]
    said = (
        "Under each KV budget: score, change on the same prompts, and bytes of the KV cache at the end relative to the full "
        "cache (the model's own sliding-window layers count in both). ↑: higher is better."
    )
    return [said, *parts] if parts else [NOT_MEASURED]


def suites(found: dict[str, Record], link: Link) -> list[str]:
    """A line for each task of a suite: the score with the full cache, and under every plan with its change."""
    parts = []
    for model, tasks in of_kind(found, "suite").items():
        names = list(dict.fromkeys(way["way"] for row in tasks.values() for way in row["found"]["ways"]))
        lines = []
        for name, row in tasks.items():
            one = row["found"]
            ways = {way["way"]: way for way in one["ways"]}
            cells = [_score(ways[name]) if name in ways else "" for name in names]
            lines.append([link(row["row"], name), *cells, f"{one['items']}<br>{one['document_tokens']['median']:,.0f}"])
        parts += [f"**{model}**", table(["suite and task", *map(_column, names), "prompts, tokens"], lines)]
    said = (
        "The document is compressed before the question is known ([how](evaluation.md#long-context-suites)). Scores are the "
        "lm-evaluation-harness's, from 0 to 1, with the change on the same prompts and the bytes of the compressed document's KV "
        "cache relative to the full cache."
    )
    return [said, *parts] if parts else [NOT_MEASURED]


def _column(way: str) -> str:
    return "full cache" if way == "full" else budget_name(way)


def _score(way: Record) -> str:
    if "change" not in way:
        return sure(way, "score", ".3f")
    return f"{way['score']:.3f}<br>{sure(way, 'change', '+.3f')}<br>{way['kept']:.1%}"


def agreement(found: dict[str, Record], link: Link) -> list[str]:
    parts = []
    for model, tasks in of_kind(found, "quality").items():
        budgets = list(
            dict.fromkeys(way["way"] for row in tasks.values() for way in row["found"]["ways"] if "change" in way)
        )
        lines = []
        for row in tasks.values():
            ways = {way["way"]: way for way in row["found"]["ways"]}
            cells = [_agreement(ways[budget]) if budget in ways else "" for budget in budgets]
            lines.append([link(row["row"], row["found"]["task"]), *cells])
        parts += [f"**{model}**", table(["task", *(f"{float(budget):.1%}" for budget in budgets)], lines)]
    said = "KL in nats per token, share of greedy tokens before the first difference, and share of identical outputs."
    return [said, *parts] if parts else [NOT_MEASURED]


def _agreement(way: Record) -> str:
    return "<br>".join(
        sure(way, key, form) for key, form in (("kl", ".4f"), ("same_tokens", ".1%"), ("same_output", ".1%"))
    )


def speed(found: dict[str, Record], link: Link) -> list[str]:
    """Lines as in docs/performance.md."""
    parts = []
    for model, cases in of_kind(found, "speed").items():
        lines = [
            [
                *(link(row["row"], f"{one['context']:,}"), str(one["batch"]), emphasize(one["way"])),
                *(f"{one['decode_ratio']['median']:.2f}", format_range(one["decode_s"], 1e3)),
                *(f"{one['prefill_ratio']['median']:.2f}", format_range(one["prefill_s"], 1, 2)),
            ]
            for row in _in_order(cases)
            for one in row["found"]["results"]
        ]
        heads = ["context", "sequences", "", "TPOT ratio", "TPOT, ms", "TTFT ratio", "TTFT, s"]
        parts += [f"**{model}**, {_dtypes(cases)}; ratio: time of transformers / time", table(heads, lines)]
    return parts or [NOT_MEASURED]


def memory(found: dict[str, Record], link: Link) -> list[str]:
    parts = []
    for model, cases in of_kind(found, "memory").items():
        lines = []
        for row in _in_order(cases):
            for one in row["found"]["results"]:
                kv = (
                    ["", UNKNOWN]
                    if one["kv_bytes"] is None
                    else [f"{one['kv_ratio']:.3f}", f"{one['kv_bytes'] / 1e6:.1f}"]
                )
                peak = one["peak_bytes"]
                process = (
                    ["", UNKNOWN]
                    if peak is None
                    else [f"{one['peak_ratio']['median']:.3f}", format_range(peak, 1e-6, 0)]
                )
                case = [link(row["row"], f"{one['context']:,}"), str(one["batch"]), emphasize(one["way"])]
                lines.append([*case, *kv, *process])
        heads = ["context", "sequences", "", "KV cache ratio", "KV cache, MB", "peak memory ratio", "peak memory, MB"]
        parts += [f"**{model}**, {_dtypes(cases)}; ratio: bytes / bytes of transformers", table(heads, lines)]
    return parts or [NOT_MEASURED]


def _in_order(cases: dict[str, Record]) -> list[Record]:
    return sorted(cases.values(), key=lambda row: (row["settings"]["batches"], row["settings"]["contexts"]))


def _dtypes(cases: dict[str, Record]) -> str:
    return ", ".join(dict.fromkeys(row["found"]["dtype"] for row in cases.values()))


def serving(found: Record, link: str) -> list[str]:
    """What `headsink bench serving` measured of each server."""
    if not found:
        return [NOT_MEASURED]
    lines = [f"{link}, `{found['command']}`", table(HEADS, cells(found))]
    return [*lines, " ".join(compared(found))] if found["ratios"] else lines


def domains(found: dict[str, Record], link: Link) -> list[str]:
    """Plans calibrated on one kind of text and tested on every kind, and how far texts and plans of two kinds differ."""
    parts = []
    for model, cases in of_kind(found, "families").items():
        for row in cases.values():
            one = row["found"]
            cells: dict[str, list[str]] = {}
            for cell in one["cells"]:
                answers = f"{cell['right']}/{cell['right_full']}"
                cells.setdefault(cell["calibrated_on"], []).append(f"{sure(cell, 'kl', '.4f')}<br>{answers}")
            tested = [f"on {kind}" for kind in dict.fromkeys(cell["tested_on"] for cell in one["cells"])]
            lines = [[link(row["row"], made), *tests] for made, tests in cells.items()]
            noise = ", ".join(f"{each['tested_on']} {sure(each, 'kl', '+.4f')}" for each in one["noise"])
            parts += [
                f"**{model}**, {one['context']:,} tokens, KV budget {one['budget']:.1%}, plans of two seeds: KL in nats per "
                "token, and correct answers among those that the full cache gets right",
                table(["calibrated on", *tested], lines),
                f"- A plan of another domain costs {sure(one['own'], 'kl', '+.4f')} more than the domain's own (below 0: less). "
                f"Two seeds of one domain differ by: {noise}.\n"
                + "\n".join(
                    _differences(one, same, what) for same, what in ((True, "one domain"), (False, "two domains"))
                ),
            ]
    return parts or [NOT_MEASURED]


def _differences(found: Record, same: bool, what: str) -> str:
    """How far texts of one domain, or of two, differ, and how far their plans do."""
    pairs = [pair for pair in found["census"]["pairs"] if (pair["families"][0] == pair["families"][1]) is same]
    plans = [pair["moved"] for pair in found["agreement"] if (pair["plans"][0] == pair["plans"][1]) is same]
    far = [pair["scores"]["far"]["beyond_chance"] for pair in pairs]
    roles = [pair["other_role"] for pair in pairs]
    return (
        f"- Texts of {what}: {statistics.mean(far):.1%} of the heads differ in far attention, {statistics.mean(roles):.1%} in "
        f"role; plans give {statistics.mean(plans):.1%} of the keys to other heads."
    )


def missing_section(done: dict[str, Record], link: Link) -> list[str]:
    lines = [f"- {link(name)}: {row['missing']}" for name, row in done.items() if "missing" in row]
    peers: dict[str, list[str]] = {}
    for name, row in done.items():
        for peer in row.get("found", {}).get("peers", []):
            if "missing" in peer:
                install = f" ({peer['install']})" if "install" in peer else ""
                peers.setdefault(f"{peer['peer']}: {peer['missing']}{install}", []).append(link(name))
    lines += [f"- {reason}, in {', '.join(names)}" for reason, names in peers.items()]
    return ["\n".join(lines) if lines else "Every row was measured."]


def commands(done: dict[str, Record], link: Link) -> list[str]:
    """A line for each row, with the options of its command."""
    lines = [[link(name), _options(row), row["date"], _took(row)] for name, row in done.items()]
    said = (
        f"`{COMMAND} ROW OPTIONS` measures a row; `headsink bench rerun DIR ROW` measures it again and compares every figure. "
        "DIR is the folder of the rows; LLAMA-CPP and VLLM are where these are installed."
    )
    return [said, table(["row", "options", "date", "duration"], lines)]


def _options(row: Record) -> str:
    """What the command adds to the one that all rows share; the whole command if it is another one."""
    rest = str(row["command"]).removeprefix(f"{COMMAND} {row['row']}").strip()
    return f"`{rest}`" if rest else ""


def _took(row: Record) -> str:
    if "seconds" not in row:
        return "not measured"
    return f"{row['seconds']:,.0f} s" + (" after resuming" if row.get("resumed") else "")

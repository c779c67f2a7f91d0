"""The census of a model: every head, at several lengths, on several kinds of text, in one folder.

`analyze` runs it. A folder holds `census.json` (settings, enough to run it again), `heads.parquet` (one row per head, length
and text), `arrays.safetensors` (attention to every key, distance profiles, token ids) and `report.html`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink import corpus
from headsink.architecture import Architecture, decoder, describe
from headsink.attention import Seen, engaged, observing
from headsink.census.roles import role
from headsink.census.statistics import SCORES, SINK_TOKENS, LayerStatistics, Thresholds, distances, layer_statistics
from headsink.census.transfer import RULES, Transfer, transfer
from headsink.errors import HeadsinkError
from headsink.files import new_folder
from headsink.plan import Fingerprint
from headsink.progress import bar

SCHEMA = 1
MARKER = "census.json"
TOP_KEYS = 8
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Text:
    """A text of the census: its kind (`domain`), its number within the kind, and its token ids."""

    domain: str
    number: int
    ids: list[int]


@dataclass
class Census:
    """Results of `analyze`. `settings` says how they were made, `table` has a row per head, length and text."""

    settings: dict[str, Any]
    table: pa.Table
    arrays: dict[str, Tensor]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return list(self.table.to_pylist())

    @property
    def lengths(self) -> list[int]:
        return list(self.settings["lengths"])

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(text["domain"] for text in self.settings["texts"]))

    def score(self, name: str, length: int, domain: str | None = None) -> Tensor:
        """One column as float64 [layers, heads], the mean over the texts of a domain (all texts if None)."""
        model = self.settings["model"]
        sums = torch.zeros(model["layers"], model["query_heads"], dtype=torch.float64)
        texts = set()
        for row in self.rows:
            if row["length"] == length and domain in (None, row["domain"]):
                sums[row["layer"], row["head"]] += row[name]
                texts.add((row["domain"], row["text"]))
        if not texts:
            raise HeadsinkError(f"the census has nothing at length {length}" + (f" on {domain}" if domain else ""))
        return sums / len(texts)

    def first_question(self, length: int, domain: str | None = None) -> list[Transfer]:
        """Do head numbers carry over between layers? One answer per rule for what a sink is."""
        seed = self.settings["seed"]
        return [
            transfer(self.score(score, length, domain) >= least, rule, seed=seed)
            for rule, (score, least) in RULES.items()
        ]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the folder, atomically, report and pictures included. An older census there is replaced."""
        from headsink.report import write_pictures, write_report  # the report reads a census, not the other way round

        folder = Path(folder)
        with new_folder(folder, MARKER) as part:
            pq.write_table(self.table, part / "heads.parquet")
            save_file({name: array.contiguous() for name, array in self.arrays.items()}, part / "arrays.safetensors")
            write_report(self, part / "report.html")
            write_pictures(self, part)
            (part / MARKER).write_text(json.dumps(self.settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Census:
        """Read a folder that `save` wrote."""
        folder = Path(folder)
        try:
            settings = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            if settings["schema"] != SCHEMA:
                raise HeadsinkError(
                    f"{folder}: census schema {settings['schema']} is not {SCHEMA}, which this version reads"
                )
            return cls(settings, pq.read_table(folder / "heads.parquet"), load_file(folder / "arrays.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, pa.ArrowException) as error:
            raise HeadsinkError(f"{folder}: not a census folder, or damaged ({type(error).__name__})") from error


def analyze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int] = (512, 4096),
    domains: Sequence[str] = corpus.DOMAINS,
    texts: Sequence[str] | None = None,
    texts_per_domain: int = 1,
    limits: Thresholds | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Census:
    """See what every attention head looks at.

    Parameters
    ----------
    lengths : tokens; all are read off the same texts, the longest of which must fit the model.
    domains : kinds of built-in text (corpus.py); `texts_per_domain` of each.
    texts : your own instead, each of at least the longest length.
    limits : what counts as a sink token and as near.
    progress : show a bar on standard error.

    Returns
    -------
    Census, to be saved with `.save(folder)`.
    """
    shape, limits = describe(model), limits or Thresholds()
    lengths = _check_lengths(lengths, shape)
    chosen = _texts(tokenizer, lengths[-1], domains, texts, texts_per_domain, seed)
    rows: list[dict[str, Any]] = []
    arrays: dict[str, Tensor] = {}
    with bar("census", len(chosen) * shape.layers, progress) as shown:
        for text in chosen:
            layers: list[LayerStatistics] = []

            def see(seen: Seen, layers: list[LayerStatistics] = layers) -> None:
                layers.append(layer_statistics(seen, lengths, limits, shape.windows[seen.layer]))
                shown.advance(shown.task_ids[0])

            with torch.no_grad(), engaged(model), observing(see):
                decoder(model)(torch.tensor([text.ids], device=model.device), use_cache=False)
            rows += [
                row
                for layer, found in enumerate(layers)
                for row in _rows(text, layer, found, lengths, shape, tokenizer)
            ]
            arrays |= _arrays(text, layers, lengths)
    settings = {
        "schema": SCHEMA,
        "headsink": version("headsink"),
        "model": {"name": model.config.name_or_path.split("/")[-1], **Fingerprint.of(model).model_dump()},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "lengths": lengths,
        "texts": [{"domain": t.domain, "number": t.number, "sha256": _digest(t.ids)} for t in chosen],
        "limits": asdict(limits),
        "seed": seed,
        "own_texts": list(texts) if texts else None,
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
    }
    return Census(settings, pa.Table.from_pylist(rows), arrays)


def _check_lengths(lengths: Sequence[int], shape: Architecture) -> list[int]:
    if not lengths:
        raise HeadsinkError("lengths: give at least one")
    for length in lengths:
        if length < 2:
            raise HeadsinkError(f"lengths: {length} is too short, a census needs 2 tokens or more")
        if length > shape.max_context:
            raise HeadsinkError(f"lengths: {length} is over the model's maximum of {shape.max_context} tokens")
    return sorted(set(lengths))


def _texts(
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    domains: Sequence[str],
    texts: Sequence[str] | None,
    number: int,
    seed: int,
) -> list[Text]:
    if texts is None:
        if number < 1:
            raise HeadsinkError(f"texts_per_domain: {number} is none")
        return [
            Text(domain, n, corpus.tokens(domain, tokenizer, longest, seed=seed + n, split="heldout"))  # type: ignore[arg-type]
            for domain in dict.fromkeys(domains)
            for n in range(number)
        ]
    found = []
    for n, text in enumerate(texts):
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) < longest:
            raise HeadsinkError(f"texts: number {n} has {len(ids)} tokens, fewer than the longest length, {longest}")
        found.append(Text("own", n, ids[:longest]))
    if not found:
        raise HeadsinkError("texts: none given")
    return found


def _rows(
    text: Text,
    layer: int,
    found: LayerStatistics,
    lengths: list[int],
    shape: Architecture,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """The table's rows for one layer and text."""
    rows = []
    for n, length in enumerate(lengths):
        steps = distances(lengths[-1]).double()
        for head in range(shape.query_heads):
            kv_head = head // shape.group
            scores = {name: float(found.scores[name][n, head]) for name in SCORES}
            top = found.attention[n, head, :length].topk(min(TOP_KEYS, length))
            rows.append(
                {
                    "domain": text.domain,
                    "text": text.number,
                    "length": length,
                    "layer": layer,
                    "head": head,
                    "kv_head": kv_head,
                    "role": role(scores["sink"], scores["local"], scores["far"], scores["far_peak"]),
                    **scores,
                    **{f"uniform_{name}": float(value[n, head]) for name, value in found.uniform.items()},
                    **{f"distance_{int(q * 100)}": _quantile(found.profile[n, head], steps, q) for q in QUANTILES},
                    **{f"error_{name}": float(value[n, kv_head]) for name, value in found.errors.items()},
                    **{name: _finite(found.sinks[name][kv_head]) for name in SINK_TOKENS},
                    "floating_positions": found.floating[kv_head],
                    "floating_tokens": [tokenizer.decode([text.ids[p]]) for p in found.floating[kv_head]],
                    "top_positions": top.indices.tolist(),
                    "top_attention": [round(value, 5) for value in top.values.tolist()],
                    "top_tokens": [tokenizer.decode([text.ids[p]]) for p in top.indices.tolist()],
                }
            )
    return rows


def _arrays(text: Text, layers: list[LayerStatistics], lengths: list[int]) -> dict[str, Tensor]:
    name = f"{text.domain}.{text.number}"
    arrays = {f"{name}.ids": torch.tensor(text.ids, dtype=torch.int32)}
    for n, length in enumerate(lengths):
        attention = torch.stack([layer.attention[n, :, :length] for layer in layers])
        arrays[f"{name}.{length}.attention"] = attention.half()  # [layers, query heads, keys]
        arrays[f"{name}.{length}.profile"] = torch.stack([layer.profile[n] for layer in layers]).float()
    return arrays


def _quantile(profile: Tensor, steps: Tensor, q: float) -> float:
    """Distance within which a share q of the attention stays, linear between the distances that were measured."""
    target = q * float(profile[-1])
    above = int((profile < target).sum())
    if above == 0:
        return float(steps[0])
    above = min(above, len(steps) - 1)
    low, high = float(profile[above - 1]), float(profile[above])
    share = (target - low) / (high - low) if high > low else 1.0
    return float(steps[above - 1] + share * (steps[above] - steps[above - 1]))


def _finite(value: Tensor) -> float | None:
    return float(value) if torch.isfinite(value) else None


def _digest(ids: list[int]) -> str:
    return hashlib.sha256(torch.tensor(ids, dtype=torch.int64).numpy().tobytes()).hexdigest()

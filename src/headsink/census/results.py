"""A census: statistics of every attention head at several lengths on several texts, and the folder that it is saved in.

`run.analyze` makes one. The folder has `census.json` (settings, enough to run it again), `arrays.safetensors` (all results),
`heads.parquet` (the scores as a table for other programs: one row per text, length and head), `tokens.json` (the text of every
token id), and, if `headsink.write_report` wrote it, `report.html` and pictures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from headsink.census.checks import SCHEMA, check
from headsink.census.first_layer import RULES, Transfer, transfer
from headsink.census.head_statistics import KEPT, SCORES, TOKENS, distance_within, windows
from headsink.census.notebook import Head, census_page
from headsink.census.options import CENSUS as MARKER
from headsink.census.options import check_census
from headsink.census.roles import EPSILON, MASSES, ROLES, law, required_window, roles
from headsink.errors import HeadsinkError
from headsink.utils import notebook
from headsink.utils.files import new_folder, parse_json, read_text
from headsink.utils.format import ranges
from headsink.utils.statistics import Interval, interval

QUANTILES = (0.1, 0.5, 0.9)  # of the attention distance, in the table


@dataclass
class Census:
    """Results of `analyze`.

    settings: how they were made. vocabulary: token id -> its text. Tensors have a row for each of `layers`. A layer with fewer KV
    heads than others repeats its own. arrays["{text}.{length}.{name}"], with texts numbered as in `settings["texts"]`, for every
    length that the text has (see `HeadStatistics`):

    scores, uniform : float64 [layers, query heads, SCORES], uniform is NaN for scores that flat attention does not have
    profile : float32 [layers, query heads, distances], attention within 1, 2, 4, ... keys
    errors, group_errors : float32 [layers, query or KV heads, KEPT, windows], squared output error relative to the layer's output
    tokens : float64 [layers, KV heads, TOKENS]
    secondary : int32 [layers, KV heads, most], positions of the secondary sinks, padded with -1
    short_keys, short_attention : float32 [layers, KV heads, taus]
    top : int32 [layers, query heads, TOP_KEYS], positions of the keys with most attention, padded with -1
    attention : float16 [layers, query heads, tokens], mean attention to each key

    and arrays["{text}.ids"], int32 [tokens].
    """

    settings: dict[str, Any]
    vocabulary: dict[int, str]
    arrays: dict[str, Tensor]

    def __repr__(self) -> str:
        model, lengths = self.settings["model"], ", ".join(map(str, self.lengths))
        shape = f"{model['layers']} layers of {model['query_heads']} query heads and {model['kv_heads']} KV heads"
        texts = f"{len(self.settings['texts'])} texts ({', '.join(self.domains)})"
        return f"Census of {model['name']}: {shape}, {texts} at {lengths} tokens"

    @property
    def layers(self) -> list[int]:
        """The numbers, in the model, of its layers with attention: one for each row of layers in the tensors of a census."""
        model = self.settings["model"]
        return list(model.get("numbers") or range(model["layers"]))

    @property
    def lengths(self) -> list[int]:
        return list(self.settings["lengths"])

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(text["domain"] for text in self.settings["texts"]))

    def texts(self, length: int, domain: str | None = None) -> list[int]:
        """Numbers of the texts with `length` tokens of a domain (None for all). Raises HeadsinkError if there are none."""
        numbers = self._reaching(length, domain)
        if not numbers:
            raise HeadsinkError(
                f"the census has nothing at length {length}{f' on {domain}' if domain else ''}; it has lengths "
                f"{', '.join(map(str, self.lengths))} and texts {', '.join(self.domains)}"
            )
        return numbers

    def has(self, length: int, domain: str | None = None) -> bool:
        """Whether a text of the domain has `length` tokens."""
        return bool(self._reaching(length, domain))

    def _reaching(self, length: int, domain: str | None) -> list[int]:
        return [
            number
            for number, text in enumerate(self.settings["texts"])
            if domain in (None, text["domain"]) and f"{number}.{length}.scores" in self.arrays
        ]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return int(self.settings["model"]["query_heads"] // self.settings["model"]["kv_heads"])

    def samples(self, name: str, length: int, domain: str | None = None) -> Tensor:
        """An array of every text, stacked: float64 [texts, layers, ...]. name: an array, a score, or "uniform_" and a score.

        Raises HeadsinkError for a name, a length or a domain that the census does not have.
        """
        array, column, texts = name, None, self.texts(length, domain)
        if name.removeprefix("uniform_") in SCORES:
            array = "uniform" if name.startswith("uniform_") else "scores"
            column = list(SCORES).index(name.removeprefix("uniform_"))
        elif f"{texts[0]}.{length}.{name}" not in self.arrays:
            raise HeadsinkError(f"score: {name!r} is unknown; one of {', '.join(SCORES)}")
        stacked = torch.stack([self.arrays[f"{text}.{length}.{array}"] for text in texts]).double()
        return stacked if column is None else stacked[..., column]

    def score(self, name: str, length: int, domain: str | None = None) -> Tensor:
        """Mean of `samples` over the texts of a domain (None for all texts): float64 [layers, heads, ...]."""
        return self.samples(name, length, domain).mean(0)

    def strongest(
        self, name: str, count: int, length: int | None = None, domain: str | None = None
    ) -> list[tuple[int, int]]:
        """The query heads with the highest `score`, first the highest: pairs of layer and head, as `headsink.ablate` takes them.

        length: the longest if not given. Raises HeadsinkError for an unknown score, and for more heads than the model has.
        """
        if name not in SCORES:
            raise HeadsinkError(f"score: {name!r} is unknown; one of {', '.join(SCORES)}")
        score = self.score(name, self.lengths[-1] if length is None else length, domain)
        if not 1 <= count <= score.numel():
            raise HeadsinkError(f"strongest: {count} heads were asked for; the census has {score.numel()}")
        best = score.flatten().argsort(descending=True, stable=True)[:count].tolist()
        return [self.place(index) for index in best]

    def place(self, index: int) -> tuple[int, int]:
        """Layer and head of an element of a flattened tensor [layers, query heads]."""
        row, head = divmod(index, self.settings["model"]["query_heads"])
        return self.layers[row], head

    def interval(self, name: str, length: int, domain: str | None = None) -> Interval:
        """Mean with its 95 % confidence interval over texts."""
        return interval(self.samples(name, length, domain))

    def _masses(self, length: int, domain: str | None) -> Iterator[dict[str, Tensor]]:
        """The attention masses of each text, then those of flat attention."""
        for prefix in ("", "uniform_"):
            yield {name: self.samples(prefix + name, length, domain) for name in MASSES}

    def text_roles(self, length: int, domain: str | None = None) -> Tensor:
        """Role of every head in each text: int64 [texts, layers, query heads], index into ROLES."""
        return roles(*self._masses(length, domain))

    def mean_roles(self, length: int, domain: str | None = None) -> Tensor:
        """Role of every head by its mean masses: int64 [layers, query heads], index into ROLES."""
        return roles(*({name: of.mean(0) for name, of in masses.items()} for masses in self._masses(length, domain)))

    def roles(self, length: int, domain: str | None = None) -> list[list[str]]:
        """`mean_roles` as names: [layers][query heads]."""
        return [[ROLES[n] for n in layer] for layer in self.mean_roles(length, domain).tolist()]

    def role_agreement(self, length: int, domain: str | None = None) -> Tensor:
        """Share of texts in which a head has its `mean_roles` role: float64 [layers, query heads]."""
        return (self.text_roles(length, domain) == self.mean_roles(length, domain)).double().mean(0)

    def required_window(
        self,
        length: int,
        domain: str | None = None,
        *,
        epsilon: float = EPSILON,
        heads: str = "query",
        kept: str = "secondary",
    ) -> Tensor:
        """Smallest window with an output error of at most epsilon: float64 [layers, query or KV heads], in tokens.

        heads: "query" or "kv". kept: "first" keeps the window and the initial tokens, "secondary" also the secondary sinks.
        """
        name = {"query": "errors", "kv": "group_errors"}[heads]
        errors = self.score(name, length, domain)[:, :, KEPT.index(kept)]
        return required_window(errors, windows(length), length, epsilon)

    def window_law(
        self, domain: str | None = None, *, epsilon: float = EPSILON, least: int = 64
    ) -> tuple[Tensor, Tensor] | None:
        """Scale and exponent of `window = scale x length ^ exponent` for every KV head, over lengths of at least `least`.

        float64 [layers, KV heads] each. None with fewer than two lengths.
        """
        lengths = [n for n in self.lengths if n >= least and self.has(n, domain)]
        if len(lengths) < 2:
            return None
        needed = [self.required_window(n, domain, epsilon=epsilon, heads="kv") for n in lengths]
        return law(torch.stack(needed), lengths)

    def distance(self, quantile: float, length: int, domain: str | None = None) -> Tensor:
        """Distance in keys that contains a share (`quantile`) of the attention: float64 [layers, query heads]."""
        return distance_within(self.score("profile", length, domain), quantile, length)

    def first_question(self, length: int, domain: str | None = None) -> list[Transfer]:
        """Whether sinks in one layer predict sinks in later ones: a result for each definition of a sink in RULES."""
        seed = self.settings["seed"]
        return [
            transfer(self.score(score, length, domain) >= least, rule, group=self.group, seed=seed)
            for rule, (score, least) in RULES.items()
        ]

    def head(self, layer: int, head: int) -> Head:
        """One query head, which shows itself in a notebook; `.show()` elsewhere. layer: one of `layers`.

        Raises HeadsinkError if there is no such head.
        """
        heads = self.settings["model"]["query_heads"]
        if not (layer in self.layers and 0 <= head < heads):
            raise HeadsinkError(
                f"head: there is no layer {layer}, head {head}; the census has layers {ranges(self.layers)} of query heads "
                f"0 to {heads - 1}"
            )
        return Head(self, layer, head)

    def show(self) -> None:
        """Show the roles and the strongest heads in a notebook, elsewhere in the browser."""
        notebook.show(census_page(self))

    def _repr_html_(self) -> str:
        return notebook.frame(census_page(self), height=700)

    @cached_property
    def table(self) -> pa.Table:
        """The scores as a table with a row per text, length, layer and query head."""
        return pa.concat_tables(self._tables(), promote_options="default")  # longer texts have more windows

    def _tables(self) -> Iterator[pa.Table]:
        heads = torch.arange(self.settings["model"]["query_heads"])
        layer, head = torch.meshgrid(torch.tensor(self.layers), heads, indexing="ij")
        for length in self.lengths:
            for number, role in zip(self.texts(length), self.text_roles(length), strict=True):
                text, of = self.settings["texts"][number], f"{number}.{length}"
                scores, uniform, errors = (self.arrays[f"{of}.{name}"] for name in ("scores", "uniform", "errors"))
                by_head = {name: self.arrays[f"{of}.{name}"] for name in ("tokens", "group_errors")}
                tokens, group_errors = (array.repeat_interleave(self.group, 1) for array in by_head.values())
                columns = {"layer": layer, "head": head, "kv_head": head // self.group}
                columns |= {name: scores[..., n] for n, name in enumerate(SCORES)}
                columns |= {f"uniform_{name}": uniform[..., n] for n, name in enumerate(SCORES)}
                columns |= {
                    f"distance_{round(100 * q)}": distance_within(self.arrays[f"{of}.profile"].double(), q, length)
                    for q in QUANTILES
                }
                columns |= {name: tokens[..., n] for n, name in enumerate(TOKENS)}
                for n, kept in enumerate(KEPT):
                    for w, window in enumerate(windows(length)):
                        columns[f"error_{kept}_{window}"] = errors[:, :, n, w]
                        columns[f"kv_error_{kept}_{window}"] = group_errors[:, :, n, w]
                rows = layer.numel()
                start = {"domain": [text["domain"]] * rows, "text": [text["number"]] * rows, "length": [length] * rows}
                start["role"] = [ROLES[n] for n in role.flatten().tolist()]
                yield pa.table(start | {name: column.flatten().numpy() for name, column in columns.items()})

    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the results to a folder, atomically. An older census there is replaced; other files stay.

        `headsink.write_report` also writes a report and pictures.

        force: also replace files with the same names that headsink did not write.
        """
        with new_folder(folder, MARKER, force) as part:
            self.write(part)
        return Path(folder)

    def write(self, folder: Path) -> None:
        """Write the files of `save` to an existing folder."""
        pq.write_table(self.table, folder / "heads.parquet")
        save_file({name: array.contiguous() for name, array in self.arrays.items()}, folder / "arrays.safetensors")
        (folder / "tokens.json").write_text(json.dumps(self.vocabulary, ensure_ascii=False), encoding="utf-8")
        (folder / MARKER).write_text(json.dumps(self.settings, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Census:
        """Read a folder that `save` wrote. Raises HeadsinkError if it is not a census, damaged, or of another schema."""
        folder = Path(folder)
        check_census(folder)
        damaged = f"{folder}: not a census folder, or damaged"
        try:
            settings = parse_json(read_text(folder / MARKER), str(folder / MARKER))
            vocabulary = parse_json(read_text(folder / "tokens.json"), str(folder / "tokens.json"))
            arrays = load_file(folder / "arrays.safetensors")
        except HeadsinkError as error:
            raise HeadsinkError(f"{damaged}: {error}") from error
        except (OSError, SafetensorError) as error:
            raise HeadsinkError(f"{damaged}: arrays.safetensors cannot be read") from error
        if isinstance(settings, dict) and settings.get("schema", SCHEMA) != SCHEMA:
            raise HeadsinkError(
                f"{folder}: a census of schema {settings['schema']}, and this headsink reads {SCHEMA}; make a new one: "
                f"headsink analyze MODEL --out {folder}"
            )
        if isinstance(settings, dict):
            settings.pop("files", None)  # describes the folder, not the census
        if problem := check(settings, vocabulary, arrays):
            raise HeadsinkError(f"{damaged}: {problem}")
        return cls(settings, {int(token): text for token, text in vocabulary.items()}, arrays)

"""Run a census: forward passes over texts, with the statistics of every layer; continues an interrupted run.

Each text is one forward pass that gives the statistics of all lengths, since in a causal model a prefix of a text does not depend
on the rest. If rotary positions depend on the length (dynamic and long scaling), each length is a pass of its own. With tensor
parallelism every process runs this and has the whole census at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.attention.interface import AttentionRecord, observe_attention
from headsink.census.checks import SCHEMA, SEEDS, TOP_KEYS, misfit
from headsink.census.head_statistics import KEPT, SCORES, TOKENS, HeadStatistics, Thresholds, head_statistics
from headsink.census.options import QUERIES, check_lengths
from headsink.census.results import Census
from headsink.data import corpus
from headsink.data.domains import DOMAIN_RULE, is_domain
from headsink.errors import HeadsinkError
from headsink.models import devices, timing
from headsink.models.builtin import title
from headsink.models.distributed import input_device, is_main, wait_for_all
from headsink.models.fingerprint import Fingerprint
from headsink.models.spec import Architecture, decoder, describe
from headsink.utils.files import check_text, clear_errors, is_ours, parse_json, read_text, remove, write_text
from headsink.utils.progress import bar, console

LENGTHS = (512, 4096)
OWN_LENGTHS_FROM = 16
SETTINGS = "census-checkpoint.json"  # file in a checkpoint with the settings of its census


@dataclass(frozen=True)
class Text:
    """A text of the census: its kind (`domain`), its number within the kind, and its token ids."""

    domain: str
    number: int
    ids: list[int]

    @property
    def digest(self) -> str:
        return hashlib.sha256(torch.tensor(self.ids, dtype=torch.int64).numpy().tobytes()).hexdigest()


def analyze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int] | None = None,
    domains: Sequence[str] = corpus.CENSUS_DOMAINS,
    texts: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    texts_per_domain: int = 2,
    limits: Thresholds | None = None,
    queries: int = QUERIES,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Census:
    """Measure statistics of every attention head of a model.

    Parameters
    ----------
    lengths : in tokens, all measured on the same texts; by default 512 and 4096. For your own texts: by default the length of the
        shortest text and powers of two up to the longest.
    domains : kinds of built-in text (data/corpus.py), `texts_per_domain` of each. Confidence intervals need two or more.
    texts : your own texts instead, as a list or by kind, {"tickets": [...], "mails": [...]}. A text is used at the lengths that
        it has.
    limits : definition of sink tokens and local keys.
    queries : largest number of queries sampled per length, evenly spaced (docs/census.md).
    checkpoint : folder for finished texts, one file each. The same call continues from it after an interruption.
    progress : show a progress bar on standard error.

    Returns
    -------
    Census; save it with `.save(folder)`.

    Raises HeadsinkError for invalid arguments, for lengths over the model's maximum, and for texts that are too short.
    """
    shape, limits = describe(model), limits or Thresholds()
    shape.refuse("analyze", "chunked_attention")
    if len({shape.heads[layer][0] for layer in shape.attending}) > 1:
        raise HeadsinkError(f"analyze: the layers of {shape.name} have different numbers of query heads; not supported")
    if queries < 2:
        raise HeadsinkError(f"queries: {queries} is too few, give 2 or more")
    if not SEEDS[0] <= seed < SEEDS[1]:
        raise HeadsinkError(f"seed: {seed} has more than 64 bits")
    chosen, lengths = _texts(tokenizer, shape, lengths, domains, texts, texts_per_domain, seed)
    settings = _settings(
        model,
        shape,
        chosen,
        lengths=lengths,
        texts_per_domain=texts_per_domain,
        own_texts=_by_domain(texts),
        limits=asdict(limits),
        queries=queries,
        seed=seed,
    )
    finished = Checkpoint(checkpoint, settings) if checkpoint is not None else None
    arrays: dict[str, Tensor] = {}
    passes = [_passes(shape, [n for n in lengths if n <= len(text.ids)]) for text in chosen]
    steps = sum(map(len, passes)) * len(shape.attending)
    if finished and progress and (count := sum(finished.has(number) for number in range(len(chosen)))):
        console.print(f"continuing: {count} of {len(chosen)} texts are done", highlight=False)
    if progress and is_main():
        timing.print_estimate("census", model, sum(of[-1] for of_text in passes for of in of_text), timing.CENSUS)
    with bar("census", steps, progress and is_main()) as shown:
        for number, (text, of_text) in enumerate(zip(chosen, passes, strict=True)):
            done = finished.read(number) if finished else None
            if done is None:
                done = {"ids": torch.tensor(text.ids, dtype=torch.int32)}
                for together in of_text:
                    ids = text.ids[: together[-1]]
                    done |= _read(
                        model, shape, ids, together, limits, queries, lambda: shown.advance(shown.task_ids[0])
                    )
                if finished:
                    finished.write(number, done)
            else:
                shown.advance(shown.task_ids[0], len(of_text) * len(shape.attending))
            arrays |= {f"{number}.{name}": array for name, array in done.items()}
    occurring = sorted({token for text in chosen for token in text.ids})
    return Census(settings, {token: tokenizer.decode([token]) for token in occurring}, arrays)


def _settings(model: PreTrainedModel, shape: Architecture, chosen: Sequence[Text], **given: Any) -> dict[str, Any]:
    """What a census was made with, enough to make it again. given: the arguments of `analyze` as they are stored."""
    return {
        "schema": SCHEMA,
        "headsink": version("headsink"),
        "model": {
            "name": title(model.config.name_or_path, shape.name),
            "source": model.config.name_or_path,
            **Fingerprint.of(model).model_dump(exclude={"float16", "values"}),
            "layers": len(shape.attending),
            "numbers": list(shape.attending),
            "kv_heads": _most_kv_heads(shape),
            "sliding": [shape.windows[shape.source(layer)] for layer in shape.attending],
        },
        "dtype": devices.dtype_name(model.dtype),
        "device": input_device(model).type,
        "texts": [{"domain": t.domain, "number": t.number, "tokens": len(t.ids), "sha256": t.digest} for t in chosen],
        **given,
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
    }


def _most_kv_heads(shape: Architecture) -> int:
    return max(shape.heads[layer][1] for layer in shape.attending)


def _passes(shape: Architecture, lengths: list[int]) -> list[list[int]]:
    """The lengths of a text, grouped by forward pass."""
    return [lengths] if shape.prefix_free else [[length] for length in lengths]


def analyze_again(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Census:
    """Rerun a census from its settings (`Census.settings`, the file census.json).

    Raises HeadsinkError if the weights, the dtype or the texts differ (built-in text is part of Python, so it may differ between
    Python versions).
    """
    domains = list(dict.fromkeys(text["domain"] for text in settings["texts"]))
    own, number, seed = settings["own_texts"], settings["texts_per_domain"], settings["seed"]
    chosen, lengths = _texts(tokenizer, describe(model), settings["lengths"], domains, own, number, seed)
    pairs = {
        "weights": (Fingerprint.of(model).weights, settings["model"]["weights"]),
        "dtype": (devices.dtype_name(model.dtype), settings["dtype"]),
        "texts": ([text.digest for text in chosen], [text["sha256"] for text in settings["texts"]]),
    }
    for name, (here, original) in pairs.items():
        if here != original:
            made = ", ".join(f"{what} {number}" for what, number in settings["versions"].items())
            raise HeadsinkError(f"this census cannot be rerun: the {name} are not those that it was made with ({made})")
    return analyze(
        model,
        tokenizer,
        lengths=lengths,
        domains=domains,
        texts=own,
        texts_per_domain=number,
        limits=Thresholds(**settings["limits"]),
        queries=settings["queries"],
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )


class Checkpoint:
    """A folder with the results of finished texts of one census.

    The file SETTINGS in it identifies the census. Only this file and files numbered like the census's texts are written or
    removed.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any]):
        self.folder, self.settings = Path(folder), settings
        ours, text = self.folder / SETTINGS, json.dumps(settings, indent=1, ensure_ascii=False)
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise HeadsinkError(f"checkpoint: {self.folder} is not a folder; name a new one")
        if self.folder.is_dir() and any(self.folder.iterdir()) and not is_ours(ours):
            raise HeadsinkError(f"checkpoint: {self.folder} is not a checkpoint of a census; name another folder")
        if is_main():
            if ours.is_file() and ours.read_text(encoding="utf-8") != text:
                remove_checkpoint(self.folder)  # a checkpoint of another census
            write_text(ours, text)
        wait_for_all()

    def has(self, number: int) -> bool:
        return self._path(number).is_file()

    def read(self, number: int) -> dict[str, Tensor] | None:
        """The results of a text, None if it is not finished."""
        try:
            arrays = load_file(self._path(number))
        except (OSError, SafetensorError):
            return None
        return None if misfit(self.settings, number, arrays) else arrays

    def write(self, number: int, arrays: dict[str, Tensor]) -> None:
        if not is_main():
            return
        part = self._path(number).with_suffix(".part")
        with clear_errors(part):
            part.write_bytes(save({name: array.contiguous() for name, array in arrays.items()}))
            os.replace(part, self._path(number))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:04}.safetensors"


def remove_checkpoint(folder: Path) -> None:
    """Remove a census's checkpoint, and its folder if nothing else is in it."""
    ours = folder / SETTINGS
    if not is_ours(ours):
        return
    texts = len(parse_json(read_text(ours), str(ours))["texts"])
    remove(folder, [*(f"{n:04}{ending}" for n in range(texts) for ending in (".safetensors", ".part")), SETTINGS])


def _read(
    model: PreTrainedModel,
    shape: Architecture,
    ids: list[int],
    lengths: list[int],
    limits: Thresholds,
    queries: int,
    step: Callable[[], None],
) -> dict[str, Tensor]:
    """Arrays of each length (see Census) from one forward pass."""
    layers: list[list[HeadStatistics]] = []

    def observe(seen: AttentionRecord) -> None:
        by_length = [head_statistics(seen, length, limits, queries) for length in lengths]
        heads, kv_heads, _ = shape.heads[seen.layer]
        joined = [statistics.joined(heads, kv_heads) for statistics in by_length]
        layers.append([statistics.repeated(_most_kv_heads(shape) // kv_heads) for statistics in joined])
        step()

    with torch.no_grad(), observe_attention(model, observe):
        decoder(model)(torch.tensor([ids], device=input_device(model)), use_cache=False)
    arrays: dict[str, Tensor] = {}
    for length, of_length in zip(lengths, zip(*layers, strict=True), strict=True):
        arrays |= {f"{length}.{name}": torch.stack(of_layers) for name, of_layers in _pack(of_length).items()}
    return arrays


def _pack(layers: Sequence[HeadStatistics]) -> dict[str, list[Tensor]]:
    most = max(1, *(int(layer.secondary.sum(-1).max()) for layer in layers))
    missing = torch.full_like(layers[0].scores["first"], torch.nan)
    top = [layer.attention.topk(min(TOP_KEYS, layer.attention.shape[1])).indices.int() for layer in layers]
    return {
        "scores": [torch.stack([layer.scores[name] for name in SCORES], -1) for layer in layers],
        "uniform": [torch.stack([layer.uniform.get(name, missing) for name in SCORES], -1) for layer in layers],
        "profile": [layer.profile.float() for layer in layers],
        "errors": [torch.stack([layer.errors[kept] for kept in KEPT], 1).float() for layer in layers],
        "group_errors": [torch.stack([layer.group_errors[kept] for kept in KEPT], 1).float() for layer in layers],
        "tokens": [torch.stack([layer.tokens[name] for name in TOKENS], -1) for layer in layers],
        "secondary": [_positions(layer.secondary, most) for layer in layers],
        "short_keys": [layer.short_keys.float() for layer in layers],
        "short_attention": [layer.short_attention.float() for layer in layers],
        "top": [torch.nn.functional.pad(keys, (0, TOP_KEYS - keys.shape[1]), value=-1) for keys in top],
        "attention": [layer.attention.half() for layer in layers],
    }


def _positions(flags: Tensor, most: int) -> Tensor:
    """Indices of set flags, ascending and padded with -1: bool [heads, keys] -> int32 [heads, most]."""
    index = torch.where(flags, torch.arange(flags.shape[1]), flags.shape[1])
    index = torch.nn.functional.pad(index, (0, max(0, most - flags.shape[1])), value=flags.shape[1])
    first = index.sort(-1).values[:, :most]
    return torch.where(first == flags.shape[1], -1, first).int()


# texts


def _by_domain(texts: Sequence[str] | Mapping[str, Sequence[str]] | None) -> dict[str, list[str]] | None:
    if texts is None:
        return None
    by_domain = texts if isinstance(texts, Mapping) else {"own": texts}
    return {domain: [of] if isinstance(of, str) else list(of) for domain, of in by_domain.items()}


def _texts(
    tokenizer: PreTrainedTokenizerBase,
    shape: Architecture,
    lengths: Sequence[int] | None,
    domains: Sequence[str],
    texts: Sequence[str] | Mapping[str, Sequence[str]] | None,
    number: int,
    seed: int,
) -> tuple[list[Text], list[int]]:
    """The texts, cut to the longest length, and the lengths."""
    if (own := _by_domain(texts)) is not None:
        return _own(tokenizer, shape, lengths, own)
    if number < 1:
        raise HeadsinkError(f"texts_per_domain: {number} is below 1")
    if not domains:
        raise HeadsinkError(f"domains: none given; give one or more of {', '.join(corpus.CENSUS_DOMAINS)}")
    chosen = _check_lengths(lengths or sorted({min(n, shape.max_context) for n in LENGTHS}), shape)
    built_in = [
        Text(domain, n, corpus.tokens(domain, tokenizer, chosen[-1], seed=seed + n, split="heldout"))
        for domain in dict.fromkeys(domains)
        for n in range(number)
    ]
    return built_in, chosen


def _own(
    tokenizer: PreTrainedTokenizerBase, shape: Architecture, lengths: Sequence[int] | None, own: dict[str, list[str]]
) -> tuple[list[Text], list[int]]:
    for domain, of in own.items():
        if not is_domain(domain):
            raise HeadsinkError(f"texts: the kind {domain!r} {DOMAIN_RULE}")
        for n, text in enumerate(of):
            check_text(text, f"texts: number {n} of {domain}")
    named = [
        (domain, n, tokenizer(text, verbose=False)["input_ids"][: shape.max_context])
        for domain, of in own.items()
        for n, text in enumerate(of)
    ]
    if not named:
        raise HeadsinkError("texts: none given")
    sizes = [len(ids) for _, _, ids in named]
    if lengths is None:
        powers = (2**k for k in range(max(sizes).bit_length()))
        ladder = [n for n in powers if n >= max(OWN_LENGTHS_FROM, min(sizes))]
        lengths = sorted({max(2, min(sizes)), *ladder})
    chosen = _check_lengths(lengths, shape)
    for domain, n, ids in named:
        if len(ids) < chosen[0]:
            raise HeadsinkError(
                f"texts: number {n} of {domain} has {len(ids)} tokens, fewer than the shortest length, {chosen[0]}"
            )
    if max(sizes) < chosen[-1]:
        raise HeadsinkError(f"texts: the longest has {max(sizes)} tokens, fewer than the longest length, {chosen[-1]}")
    return [Text(domain, n, ids[: chosen[-1]]) for domain, n, ids in named], chosen


def _check_lengths(lengths: Sequence[int], shape: Architecture) -> list[int]:
    check_lengths(lengths, shape.max_context)
    return sorted(set(lengths))

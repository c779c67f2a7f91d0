"""Attention maps on pages: of chosen heads for any text (`attention_maps`), and of every head in the report of a census.

What a page holds is bounded, whatever the length of the text (census/attention_maps.py says what tiles and top keys are). The
report has a coarse map of every head on one text of each kind, at most COARSE bytes together. Of at most MOST_HEADS heads, those
that stand out or that `--maps` names, it also has a finer map and the top keys of every query, on the first two of these texts,
about DETAILED bytes together. These heads can be read token by token, also of two texts side by side. Attention is stored in 8
bits, in steps of 5.6 %. `attention_maps` has more room, since its page has no other heads: 128 rows of tiles and 16 top keys.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink.census.attention_maps import Head, PooledAttention, Request, all_heads, check_heads, pooled_attention
from headsink.census.first_view import flat_keys
from headsink.census.roles import ROLES, Role
from headsink.census.views import share_of_room, token_views
from headsink.errors import HeadsinkError
from headsink.models.builtin import title
from headsink.models.fingerprint import Fingerprint
from headsink.models.spec import describe
from headsink.plan.plan import Plan
from headsink.report import charts, maps
from headsink.report.assets import environment, save_picture
from headsink.runtime.kept import kept_tokens
from headsink.utils import notebook
from headsink.utils.files import write_text
from headsink.utils.pack import one_byte, pack
from headsink.utils.progress import bar

if TYPE_CHECKING:
    from headsink.census.results import Census

Maps = Literal["auto", "none"] | Sequence[Head]
ROWS, TOP = 128, 16  # of a map of its own
COARSE, MOST_COARSE_ROWS = 2**19, 64  # bytes of the coarse maps of a report
DETAILED, DETAILED_ROWS, DETAILED_TEXTS = 3 * 2**18, 64, 2  # bytes, rows and texts of the finer maps of a report
KEY_BYTES = 3  # of a top key: its position and its attention
MOST_HEADS = 12  # that a report can hold in detail


@dataclass(frozen=True)
class AttentionMaps:
    """Attention maps of some heads on one text. In a notebook it shows itself; `maps[layer, head]` is one of them.

    attention: the maps (`headsink.census.attention_maps.PooledAttention`): `tiles` float32 [maps, rows, rows], mean over the
    queries and sum over the keys of a tile of `tile` x `tile` tokens; `mean` float32 [maps, tokens]; `keys`, `weights` [maps,
    tokens, 16], the keys with most attention of every query. words: the text of every token. kept: bool [maps, tokens], the
    tokens whose keys the head's KV head caches under a plan after the text as a prompt; None without a plan. group: query heads
    per KV head. sliding: the model's own window of each of its layers, or None. model: its name.
    """

    attention: PooledAttention
    words: list[str]
    kept: Tensor | None
    group: int
    sliding: list[int | None]
    model: str

    def __getitem__(self, head: Head) -> AttentionMaps:
        """The map of one head, (layer, query head)."""
        if head not in self.attention.heads:
            raise HeadsinkError(
                f"heads: no map of {head}; there are maps of {', '.join(map(str, self.attention.heads))}"
            )
        n, own = self.attention.heads.index(head), self.attention
        parts = {name: getattr(own, name)[n : n + 1] for name in ("tiles", "mean", "keys", "weights")}
        kept = None if self.kept is None else self.kept[n : n + 1]
        attention = PooledAttention((head,), own.tile, **parts)
        return AttentionMaps(attention, self.words, kept, self.group, self.sliding, self.model)

    def __repr__(self) -> str:
        heads = ", ".join(f"{layer}.{head}" for layer, head in self.attention.heads)
        return f"AttentionMaps of {self.model}: heads {heads}, {len(self.words)} tokens"

    def html(self) -> str:
        """A page of its own, which needs no network."""
        arrays = _packable(self.attention)
        if self.kept is not None:
            arrays["kept"] = self.kept.to(torch.uint8)
        for window in set(self.sliding):
            arrays[f"flat.{window or 0}"] = flat_keys(len(self.words), window)
        template = environment().get_template("attention_page.html.j2")
        own = {"heads": self.attention.heads, "tile": self.attention.tile, "words": self.words, "group": self.group}
        return template.render(
            model=self.model,
            heads=self.attention.heads,
            tokens=len(self.words),
            plan=self.kept is not None,
            data=pack(arrays, **own, sliding=self.sliding),
        )

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the maps to a file: if its name ends in .svg or .png, the tiles as a picture, otherwise the page.

        A picture shows every query and key of a text of up to 128 tokens, tiles of a longer one. force: also replace a file that
        headsink did not write.
        """
        kind = Path(path).suffix.lower()
        if kind not in (".svg", ".png"):
            return write_text(path, self.html(), force)
        chart = maps.attention_tiles(self.attention)
        return save_picture(path, charts.spec(chart, f"{self.model}, {len(self.words)} tokens"), force)

    def show(self) -> None:
        """Show the maps in a notebook, elsewhere in the browser."""
        notebook.show(self.html())

    def _repr_html_(self) -> str:
        return notebook.frame(self.html(), height=900)


def attention_maps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    heads: Sequence[Head],
    *,
    plan: Plan | None = None,
) -> AttentionMaps:
    """Read the attention maps of chosen heads for a text, in one forward pass and in memory linear in its length.

    Parameters
    ----------
    text : at most as long as the model reads; 8,192 tokens make a page of about half a megabyte for each head.
    heads : (layer, query head) of each. Layers are the model's own, from 0.
    plan : also mark the tokens that each head's KV head keeps and evicts under it, after the text as a prompt.

    Returns
    -------
    AttentionMaps, with `.show()` and `.save(path)`. Raises HeadsinkError for heads that the model does not have, a text over its
    maximum, a plan of another model, and a model that tensor parallelism splits.
    """
    if not heads:
        raise HeadsinkError("heads: none given; give a list of (layer, query head)")
    shape, ids = describe(model), tokenizer(text, verbose=False)["input_ids"]
    chosen = [(int(layer), int(head)) for layer, head in heads]
    (found,) = pooled_attention(model, ids, Request(chosen, ROWS, TOP))
    kept, group = None, shape.heads[shape.attending[0]][0] // max(shape.heads[layer][1] for layer in shape.attending)
    if plan is not None:
        flags = kept_tokens(model, plan, ids)
        kept = torch.stack([flags[shape.attending.index(layer), head // group] for layer, head in chosen])
    sliding = [None if source is None else shape.windows[source] for source in shape.keys_of]
    name = title(model.config.name_or_path, shape.name)
    return AttentionMaps(found, [tokenizer.decode([token]) for token in ids], kept, group, sliding, name)


# In the report of a census


@dataclass(frozen=True)
class TextMaps:
    """The maps of one text in a report: coarse ones of every head, finer ones of some, and the tokens that a plan keeps."""

    coarse: PooledAttention
    detailed: PooledAttention | None
    kept: Tensor | None  # bool [layers, KV heads, tokens]

    def pack(self, arrays: dict[str, Tensor]) -> dict[str, Any]:
        """Add the maps to the arrays of a text's data, and return what else the page must know."""
        arrays["coarse"] = one_byte(self.coarse.tiles)
        if self.kept is not None:
            arrays["kept"] = self.kept.to(torch.uint8)
        more: dict[str, Any] = {"coarse": self.coarse.tile, "heads": []}
        if self.detailed is not None:
            arrays |= {f"detailed.{name}": array for name, array in _packable(self.detailed).items()}
            more |= {"detailed": self.detailed.tile, "heads": self.detailed.heads}
        return more


def report_maps(model: PreTrainedModel, census: Census, maps: Maps, plan: Plan | None) -> dict[int, TextMaps]:
    """The maps of the texts that the report shows, by their number in the census. Empty for maps="none"."""
    if maps == "none":
        return {}
    shape = describe(model)
    if Fingerprint.of(model).weights != census.settings["model"]["weights"]:
        raise HeadsinkError("model: the census was made with another model, or with other weights")
    detailed = standing_out(census) if maps == "auto" else [(int(layer), int(head)) for layer, head in maps]
    check_maps(model, detailed)
    every, texts, share = all_heads(shape), token_views(census), share_of_room(census)
    rows = min(MOST_COARSE_ROWS, max(8, int((share * COARSE / (len(every) * len(texts))) ** 0.5)))
    found: dict[int, TextMaps] = {}
    with bar("attention maps", len(texts), True) as shown:
        for n, (text, (length, _)) in enumerate(texts.items()):
            ids = census.arrays[f"{text}.ids"][:length].tolist()
            requests = [Request(every, rows, 0)]
            if n < DETAILED_TEXTS and detailed:
                room = share * DETAILED / (len(detailed) * min(len(texts), DETAILED_TEXTS)) - DETAILED_ROWS**2
                requests.append(Request(detailed, DETAILED_ROWS, min(TOP, max(2, int(room / (KEY_BYTES * length))))))
            coarse, *finer = pooled_attention(model, ids, *requests)
            kept = None if plan is None else kept_tokens(model, plan, ids)
            found[text] = TextMaps(coarse, finer[0] if finer else None, kept)
            shown.advance(shown.task_ids[0])
    return found


def check_maps(model: PreTrainedModel, heads: Sequence[Head]) -> None:
    """Raise for heads that a model does not have, or more of them than a report holds in detail."""
    check_heads(heads, describe(model))
    if len(heads) > MOST_HEADS:
        raise HeadsinkError(
            f"maps: {len(heads)} heads given, and a report holds {MOST_HEADS}; see headsink.attention_maps"
        )


def standing_out(census: Census) -> list[Head]:
    """The heads that stand out at the longest length: the clearest of each role, and of secondary sinks."""
    length = census.lengths[-1]
    score = {name: census.score(name, length) for name in ("sink", "first", "local", "far", "far_peak", "entropy")}
    clear: dict[Role, Tensor] = {
        "sink": score["sink"],
        "local": score["local"],
        "mixed": score["sink"].minimum(score["local"]),
        "diffuse": score["entropy"],
        "retrieval": score["far_peak"],
    }
    found, roles = [int((score["sink"] - score["first"]).argmax())], census.mean_roles(length)
    for role, by in clear.items():
        own = roles == ROLES.index(role)
        if own.any():
            found.append(int(torch.where(own, by, -torch.inf).argmax()))
    return [census.place(index) for index in dict.fromkeys(found)]


def _packable(attention: PooledAttention) -> dict[str, Tensor]:
    """The arrays of maps as pages hold them."""
    short = torch.uint16 if attention.mean.shape[1] < 2**16 else torch.int32
    return {
        "tiles": one_byte(attention.tiles),
        "mean": one_byte(attention.mean),
        "keys": attention.keys.clamp(min=0).to(short),  # those that are missing have no weight
        "weights": one_byte(attention.weights),
    }

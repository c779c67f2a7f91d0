"""A prompt as transformers' `generate` hands it to a decoding loop of ours (decode.py, speculate.py).

It is checked before the model reads it, and read with every argument that the user gave to `generate`: images, token types,
positions, a mask of left padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from headsink.attention.params import Padding
from headsink.cache.cache import PlanCache
from headsink.errors import HeadsinkError
from headsink.models.transformers_names import NAMES, cache_argument, generate_argument, returned_cache
from headsink.runtime.apply import check_mask

OURS = ("attention_mask", "position_ids", "use_cache", *NAMES)  # arguments of the model that `Prompt` holds apart


def check_call(loop: str, config: Any, given: dict[str, Any]) -> None:
    """Raise if `generate` was called for something that a decoding loop of ours cannot do. given: the model's arguments."""
    mode = config.get_generation_mode(generate_argument("assistant_model"))
    wrong = {
        mode.value.replace("_", " "): mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
        "return_dict_in_generate": config.return_dict_in_generate,
        "inputs_embeds": given.get("inputs_embeds") is not None,
        "use_cache=False": given.get("use_cache") is False,
    }
    for what, is_so in wrong.items():
        if is_so:
            raise HeadsinkError(f"{loop}: it cannot do {what}; leave that out, or call plain model.generate")


@dataclass(frozen=True)
class Prompt:
    """new: tokens that the cache does not hold yet, int64 [texts, tokens]. mask: of all columns, int64 [texts, columns]; None
    without padding. places: positions, int64 [..., texts, new tokens or more], the last ones theirs. given: the model's other
    arguments."""

    model: PreTrainedModel
    new: Tensor
    mask: Tensor | None
    places: Tensor
    given: dict[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel, ids: Tensor, cache: Cache | None, config: Any, given: dict[str, Any]) -> Prompt:
        """Check what `generate` hands on. ids: the whole text, or what comes after the cache if the mask is longer than they are.

        Raises HeadsinkError for right padding, for shapes that do not belong together, and for a prompt that the cache holds
        already.
        """
        (rows, count), held = ids.shape, 0 if cache is None else cache.get_seq_length()
        mask, places = given.get("attention_mask"), given.get("position_ids")
        # `generate` drops a mask of ones, and notes how long it was.
        columns = getattr(config, "_mask_length", count) if mask is None else mask.shape[1]
        check_mask(mask, rows, count if columns == count else held + count, columns)
        new = ids[:, held:] if columns == count else ids
        if not new.shape[1]:
            raise HeadsinkError(
                f"input_ids: {count} tokens, and the cache holds {held} already; give the text with one token or more after those"
            )
        padding = padding_of(cache)
        if padding is not None and mask is None:
            raise HeadsinkError(
                "attention_mask: the cache holds a padded batch; give the mask of all its tokens and the new ones"
            )
        if places is None:
            seen = torch.ones(rows, max(columns, held + count), device=ids.device) if mask is None else mask
            places = (seen.long().cumsum(1) - 1).clamp(min=0)
        if places.shape[-2] not in (1, rows) or places.shape[-1] < new.shape[1]:
            raise HeadsinkError(
                f"position_ids: {list(places.shape)} do not fit {rows} texts with {new.shape[1]} new tokens"
            )
        places = places.expand(*places.shape[:-2], rows, places.shape[-1])
        return cls(model, new, mask, places, {name: value for name, value in given.items() if name not in OURS})

    def read(self, cache: Cache | None, chunk: int | None = None, leave: int = 0) -> Any:
        """Let the model read the new tokens, `chunk` at once, without the last `leave`; returns its last output.

        Images are not divided: a prompt with more than text in it is read at once.
        """
        kinds = {name: value for name, value in self.given.items() if name.endswith("token_type_ids")}
        rest = {name: value for name, value in self.given.items() if name not in kinds}
        texts, count, output = self.new[:, : self.new.shape[1] - leave], self.new.shape[1], None
        if not chunk or not all(isinstance(value, int | float | str | None) for value in rest.values()):
            chunk = texts.shape[1]
        for start in range(0, texts.shape[1], chunk):
            part = texts[:, start : start + chunk]
            by_column = {"attention_mask": self.mask, "position_ids": self.places, **kinds}
            later = count - start - part.shape[1]
            known = {k: v if v is None else v[..., : v.shape[-1] - later] for k, v in by_column.items()}
            given = {**known, **rest, **cache_argument(cache), "use_cache": True, "is_first_iteration": True}
            output = self.model(**self.model.prepare_inputs_for_generation(part, **given), return_dict=True)  # type: ignore[operator]
            cache = returned_cache(output)
        return output


def padding_of(cache: Cache | None) -> Padding | None:
    """What rows of a plan's cache do not see."""
    return cache.padding if isinstance(cache, PlanCache) else None

"""The prompt of a custom decoding loop of transformers' `generate` (decode.py, speculative.py): checks and prefill.

The model prefills it with every argument of `generate`: images, token types, positions, a mask of left padding.
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

OURS = ("attention_mask", "position_ids", "use_cache", *NAMES)  # arguments of the model that `Prompt` passes itself


def check_call(loop: str, config: Any, given: dict[str, Any]) -> None:
    """Raise for arguments of `generate` that the decoding loop does not support. given: the model's arguments."""
    mode = config.get_generation_mode(generate_argument("assistant_model"))
    unsupported = {
        mode.value.replace("_", " "): mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
        "return_dict_in_generate": config.return_dict_in_generate,
        "inputs_embeds": given.get("inputs_embeds") is not None,
        "use_cache=False": given.get("use_cache") is False,
    }
    for what, is_so in unsupported.items():
        if is_so:
            raise HeadsinkError(f"{loop}: it cannot do {what}; leave it out, or call plain model.generate")


@dataclass(frozen=True)
class Prompt:
    """The new tokens of a prompt and the model's arguments for them.

    new: tokens that are not cached yet, int64 [sequences, tokens]. mask: of all columns, int64 [sequences, columns]; None without
    padding. positions: int64 [..., sequences, new tokens or more]; the last ones belong to the new tokens. given: the
    model's other arguments.
    """

    model: PreTrainedModel
    new: Tensor
    mask: Tensor | None
    positions: Tensor
    given: dict[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel, ids: Tensor, cache: Cache | None, config: Any, given: dict[str, Any]) -> Prompt:
        """Check the arguments that `generate` passes to a decoding loop.

        ids: the whole prompt, or only its new tokens if the mask is longer than `ids`. Raises HeadsinkError for right padding,
        for shapes that do not fit together, and for a prompt without new tokens.
        """
        (rows, count), cached = ids.shape, 0 if cache is None else cache.get_seq_length()
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        # `generate` drops a mask of ones and records its length.
        columns = getattr(config, "_mask_length", count) if mask is None else mask.shape[1]
        check_mask(mask, rows, count if columns == count else cached + count, columns)
        new = ids[:, cached:] if columns == count else ids
        if not new.shape[1]:
            raise HeadsinkError(
                f"input_ids: {count} tokens, and the cache holds {cached} already; give the cached tokens and at least one more"
            )
        padding = cached_padding(cache)
        if padding is not None and mask is None:
            raise HeadsinkError(
                "attention_mask: the cache holds a padded batch; give the mask of all cached and new tokens"
            )
        if positions is None:
            seen = torch.ones(rows, max(columns, cached + count), device=ids.device) if mask is None else mask
            positions = (seen.long().cumsum(1) - 1).clamp(min=0)
        if positions.shape[-2] not in (1, rows) or positions.shape[-1] < new.shape[1]:
            raise HeadsinkError(
                f"position_ids: {list(positions.shape)} do not fit {rows} sequences with {new.shape[1]} new tokens"
            )
        positions = positions.expand(*positions.shape[:-2], rows, positions.shape[-1])
        return cls(model, new, mask, positions, {name: value for name, value in given.items() if name not in OURS})

    def read(self, cache: Cache | None, chunk: int | None = None, leave: int = 0) -> Any:
        """Prefill the new tokens except the last `leave`, `chunk` per forward pass; returns the model's last output.

        A prompt with more than text, such as images, is prefilled in one pass.
        """
        kinds = {name: value for name, value in self.given.items() if name.endswith("token_type_ids")}
        rest = {name: value for name, value in self.given.items() if name not in kinds}
        tokens, count, output = self.new[:, : self.new.shape[1] - leave], self.new.shape[1], None
        if not chunk or not all(isinstance(value, int | float | str | None) for value in rest.values()):
            chunk = tokens.shape[1]
        for start in range(0, tokens.shape[1], chunk):
            part = tokens[:, start : start + chunk]
            by_column = {"attention_mask": self.mask, "position_ids": self.positions, **kinds}
            later = count - start - part.shape[1]
            sliced = {k: v if v is None else v[..., : v.shape[-1] - later] for k, v in by_column.items()}
            given = {**sliced, **rest, **cache_argument(cache), "use_cache": True, "is_first_iteration": True}
            output = self.model(**self.model.prepare_inputs_for_generation(part, **given), return_dict=True)  # type: ignore[operator]
            cache = returned_cache(output)
        return output


def cached_padding(cache: Cache | None) -> Padding | None:
    """Padding of a plan's cache; None without padding or for other caches."""
    return cache.padding if isinstance(cache, PlanCache) else None

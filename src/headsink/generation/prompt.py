"""The prompt of lossless mode's decoding loop in transformers' `generate` (lossless.py): checks and prefill.

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
from headsink.models.transformers_names import NAMES, cache_argument, generate_argument
from headsink.runtime.apply import check_mask

OURS = ("attention_mask", "position_ids", "use_cache", *NAMES)  # arguments of the model that `Prompt` passes itself


def check_call(config: Any, given: dict[str, Any]) -> None:
    """Raise for arguments of `generate` that lossless mode does not support. given: the model's arguments."""
    mode = config.get_generation_mode(generate_argument("assistant_model"))
    unsupported = {
        mode.value.replace("_", " "): mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
        "return_dict_in_generate": config.return_dict_in_generate,
        "inputs_embeds": given.get("inputs_embeds") is not None,
        "use_cache=False": given.get("use_cache") is False,
    }
    for what, is_so in unsupported.items():
        if is_so:
            raise HeadsinkError(f"lossless: it cannot do {what}; leave it out, or call plain model.generate")


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt and the model's arguments for them.

    ids: int64 [sequences, tokens]. mask: int64 [sequences, tokens]; None without padding. positions: int64 [..., sequences,
    tokens or more]; the last ones belong to the tokens. given: the model's other arguments.
    """

    model: PreTrainedModel
    ids: Tensor
    mask: Tensor | None
    positions: Tensor
    given: dict[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel, ids: Tensor, config: Any, given: dict[str, Any]) -> Prompt:
        """Check the arguments that `generate` passes to a decoding loop.

        Raises HeadsinkError for right padding, for shapes that do not fit together, and for an empty prompt.
        """
        rows, count = ids.shape
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        # `generate` drops a mask of ones and records its length.
        check_mask(mask, rows, count, getattr(config, "_mask_length", count) if mask is None else mask.shape[1])
        if not count:
            raise HeadsinkError("input_ids: the prompt is empty")
        if positions is None:
            seen = torch.ones(rows, count, device=ids.device) if mask is None else mask
            positions = (seen.long().cumsum(1) - 1).clamp(min=0)
        if positions.shape[-2] not in (1, rows) or positions.shape[-1] < count:
            raise HeadsinkError(
                f"position_ids: {list(positions.shape)} do not fit {rows} sequences with {count} new tokens"
            )
        positions = positions.expand(*positions.shape[:-2], rows, positions.shape[-1])
        return cls(model, ids, mask, positions, {name: value for name, value in given.items() if name not in OURS})

    def read(self, cache: Cache, left_out: int = 0) -> Tensor:
        """Prefill all tokens but the last `left_out` into a cache, with the arguments of `generate`, such as images.

        Returns the logits after the last one, [sequences, vocabulary].
        """
        kinds = {name: value for name, value in self.given.items() if name.endswith("token_type_ids")}
        rest = {name: value for name, value in self.given.items() if name not in kinds}
        by_column = {"attention_mask": self.mask, "position_ids": self.positions, **kinds}
        end = self.ids.shape[1] - left_out
        dropped = slice(None, -left_out or None)
        sliced = {name: value if value is None else value[..., dropped] for name, value in by_column.items()}
        given = {**sliced, **rest, **cache_argument(cache), "use_cache": True, "is_first_iteration": True}
        given = self.model.prepare_inputs_for_generation(self.ids[:, :end], **given)  # type: ignore[operator]
        logits: Tensor = self.model(**given, return_dict=True).logits
        return logits[:, -1]


def cached_padding(cache: Cache | None) -> Padding | None:
    """Padding of a plan's cache; None without padding or for other caches."""
    return cache.padding if isinstance(cache, PlanCache) else None

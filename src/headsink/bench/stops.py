"""Stop strings for `model.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import StoppingCriteria


class Stops(StoppingCriteria):
    """Stop a sequence once its generated text contains a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, stops: Sequence[str]):
        self.tokenizer, self.prompt_tokens, self.stops = tokenizer, prompt_tokens, stops

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_tokens :])
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)
